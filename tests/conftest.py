"""For all tests: one thread, as threads of many small operations wait for each other on a busy machine; the order."""

import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The whole graph first: it takes longest, and what runs beside it is many small tests."""
    items.sort(key=lambda item: item.get_closest_marker("graph") is None)
