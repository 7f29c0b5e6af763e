"""For all tests: one thread, since threads of many small operations wait for each other on a busy machine."""

import torch

torch.set_num_threads(1)
