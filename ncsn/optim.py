"""Adam and AdamW of torch, without torch's compiler."""

import inspect

import torch


def eager(kind: type[torch.optim.Adam]) -> type[torch.optim.Adam]:
    """An optimizer of torch as it is where nothing is compiled: the same bits, the same state. torch's own, when first
    used, tells its compiler to let it be, and loads that: two seconds more in each process that trains."""
    methods = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    plain = {name: inspect.unwrap(getattr(kind, name)) for name in methods}
    return type(kind.__name__, (kind,), plain | {"step": torch.no_grad()(inspect.unwrap(kind.step))})


Adam, AdamW = eager(torch.optim.Adam), eager(torch.optim.AdamW)
