"""Reads the checkpoints that the papers' code wrote: ermongroup/ncsn, ermongroup/ncsnv2, yang-song/score_sde_pytorch.

All are written with torch.save: a list [network, optimizer] in 2019, [network, optimizer, epoch, step] and with EMA a
fifth entry in 2020, a dictionary with the average as a list in 2021. Nothing in a file is ever run: what
`torch.load(weights_only=True)` refuses is refused.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ncsn.networks import NCSN, NCSNDeeper, NCSNv2, NCSNv2Deeper, NCSNv2Deepest, RefineNet, ScoreNetwork
from ncsn.training import check_tensors, first_of


@dataclass(frozen=True)
class OfficialCheckpoint:
    """What a file of the official code holds.

    Attributes:
        network: With the weights of the last step.
        ema_network: With their exponential moving average, which is to be sampled from; None if the file has none.
        step: Updates done; None in files of 2019, which do not say.
        sigmas: The noise levels, shape (L,), where the file has them or the caller gave them.
        optimizer: State of torch.optim.Adam over `network.parameters()`, for its `load_state_dict`.
    """

    network: ScoreNetwork
    ema_network: ScoreNetwork | None
    step: int | None
    sigmas: Tensor | None
    optimizer: dict[str, Any]


def load(
    path: str | PathLike[str],
    *,
    sigmas: Tensor | Sequence[float] | None = None,
    nonlinearity: str = "elu",
    rescaled: bool = False,
    logit_transform: bool = False,
) -> OfficialCheckpoint:
    """Reads `checkpoint_{step}.pth` of either repository, without running code from it.

    Args:
        path: The file.
        sigmas: The noise levels, largest first; files of NCSN do not hold them, those of NCSNv2 do.
        nonlinearity: Of the configuration that the file was trained with: "elu", "relu", "lrelu" or "swish".
        rescaled: Of the configuration: the data were mapped to [-1, 1] before the network.
        logit_transform: Of the configuration: the data were logits.

    Returns:
        Networks on the CPU, in evaluation mode, and what came with them.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not such a checkpoint, would need code to be run, or its tensors do not fit.
    """
    states = _read(path)
    if not (
        isinstance(states, list)
        and len(states) in (2, 4, 5)
        and all(isinstance(state, Mapping) for state in (*states[:2], *states[4:]))
        and all(isinstance(state, int) for state in states[2:4])
    ):
        raise ValueError(
            f"expected a list [network, optimizer] or [network, optimizer, epoch, step(, ema)] as the official code "
            f"saves it, got {path} with {_described(states)}"
        )
    weights, optimizer, *rest = states
    if sigmas is None:
        sigmas = _stripped(weights).get("sigmas")
    hints: dict[str, Any] = {
        "sigmas": sigmas,
        "nonlinearity": nonlinearity,
        "rescaled": rescaled,
        "logit_transform": logit_transform,
    }
    return OfficialCheckpoint(
        network=network_from_state_dict(weights, **hints),
        ema_network=network_from_state_dict(rest[2], **hints) if len(rest) == 3 else None,
        step=rest[1] if rest else None,
        sigmas=None if sigmas is None else torch.as_tensor(sigmas),
        optimizer=dict(optimizer),
    )


def load_diffusion(path: str | PathLike[str], network: ScoreNetwork) -> OfficialCheckpoint:
    """Reads `checkpoint_{k}.pth` of yang-song/score_sde_pytorch, without running code from it.

    Its tensors are numbered, and their average is a list: both are taken up by position, with every shape checked.

    Args:
        path: The file.
        network: NCSNpp, DDPMpp or DDPM, built as the file's configuration says; on the CPU, stays as it is.

    Returns:
        Two copies of the network, with the weights of the last step and with their average, in evaluation mode; the
        noise levels of a network that was trained at them are the buffer `sigmas`, decreasing.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not such a checkpoint, would need code to be run, or its tensors do not fit.
    """
    states = _read(path)
    if not (isinstance(states, Mapping) and {"model", "ema", "optimizer", "step"} <= set(states)):
        raise ValueError(
            f"expected a dictionary with model, ema, optimizer and step as score_sde_pytorch saves it, got {path} with "
            f"{_described(states)}"
        )
    weights = _stripped(states["model"])
    sigmas = weights.pop("sigmas", None)
    average = states["ema"].get("shadow_params")
    if not (isinstance(average, list) and all(isinstance(value, Tensor) for value in average)):
        raise ValueError(f"expected ema.shadow_params, a list of tensors, in {path}, got {_described(average)}")
    raw, ema = copy.deepcopy(network).eval(), copy.deepcopy(network).eval()
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    _take_up(raw, dict(raw.state_dict()), list(weights.values()), "weights")
    ema.load_state_dict(raw.state_dict())  # what is not trained, and so not averaged
    _take_up(ema, {key: value for key, value in ema.state_dict().items() if key in trained}, average, "averages")
    return OfficialCheckpoint(raw, ema, int(states["step"]), sigmas, dict(states["optimizer"]))


def _take_up(network: ScoreNetwork, targets: Mapping[str, Tensor], values: Sequence[Tensor], what: str) -> None:
    """Copies values into targets, in their order; a matrix of a `NIN` layer is the transpose of a 1x1 convolution's."""
    if len(values) != len(targets):
        raise ValueError(
            f"expected the {len(targets)} {what} of {_name(network)} as it was built, got {len(values)}: its blocks, "
            "multipliers, attention or levels are others"
        )
    for (name, target), value in zip(targets.items(), values, strict=True):
        fitting = value.T[..., None, None] if value.ndim == 2 and target.ndim == 4 else value
        if fitting.shape != target.shape:
            raise ValueError(
                f"expected {what} of the shape {tuple(target.shape)} for {name} of {_name(network)} as it was built, "
                f"got {tuple(value.shape)}"
            )
        target.copy_(fitting)


def network_from_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    sigmas: Tensor | Sequence[float] | None = None,
    nonlinearity: str = "elu",
    rescaled: bool = False,
    logit_transform: bool = False,
) -> ScoreNetwork:
    """The network that official weights belong to, found by their names and shapes.

    Args:
        state_dict: Tensors by name, with or without the prefix `module.`; copied.
        sigmas: The noise levels, largest first, for NCSN; a `sigmas` among the tensors is taken where this is None.
        nonlinearity: "elu", "relu", "lrelu" or "swish"; the weights do not tell.
        rescaled: The data were mapped to [-1, 1] before the network, so it does not do so; the weights do not tell.
        logit_transform: The data were logits, so the network does not map them; the weights do not tell.

    Returns:
        NCSN, NCSNDeeper, NCSNv2, NCSNv2Deeper, NCSNv2Deepest or RefineNet, in evaluation mode.

    Raises:
        ValueError: If tensors are missing, unknown or of the wrong shape, or NCSN's sigmas are missing or too few.
    """
    tensors = _stripped(state_dict)
    found = tensors.pop("sigmas", None)
    network = _built(tensors, found if sigmas is None else sigmas, nonlinearity, not (rescaled or logit_transform))
    check_tensors(tensors, {key: value.shape for key, value in network.state_dict().items()}, _name(network))
    copies = {key: value.detach().to(torch.float32, copy=True) for key, value in tensors.items()}
    network.load_state_dict(copies, assign=True)
    return network.eval()


def _built(
    tensors: Mapping[str, Tensor], sigmas: Tensor | Sequence[float] | None, nonlinearity: str, rescale: bool
) -> ScoreNetwork:
    """The network on the meta device, so that no random numbers are drawn and no memory is taken."""
    first = tensors.get("begin_conv.weight")
    if first is None or first.ndim != 4:
        raise ValueError(
            f"expected weights of a RefineNet, begin_conv.weight among them, got {len(tensors)} tensors: "
            f"{first_of(list(tensors))}"
        )
    width, channels = first.shape[:2]
    arguments: dict[str, Any] = {"channels": channels, "width": width, "act": nonlinearity, "rescale": rescale}
    deeper, deepest = (any(key.startswith(stage) for key in tensors) for stage in ("res5.", "res31."))
    embedding = tensors.get("normalizer.embed.weight")
    if embedding is not None and embedding.ndim != 2:
        raise ValueError(f"expected normalizer.embed.weight of shape (L, ...), got {tuple(embedding.shape)}")
    network: type[ScoreNetwork]
    if embedding is None:
        norms = any(key.startswith("refine1.crp.norms.") for key in tensors)
        network = NCSNv2Deepest if deepest else NCSNv2Deeper if deeper else RefineNet if norms else NCSNv2
    else:
        network = NCSNDeeper if deeper else NCSN
        L = len(embedding)
        if sigmas is None or len(sigmas) != L:
            got = "none" if sigmas is None else f"{len(sigmas)} of them"
            raise ValueError(
                f"expected sigmas=..., the {L} noise levels that {_name(network)} was trained with, largest first, "
                f"since its checkpoints do not hold them; got {got}"
            )
        norm = "instance" if embedding.shape[1:] == (2 * width,) else "instance++"
        arguments |= {"sigmas": torch.as_tensor(sigmas).cpu(), "norm": norm}
    with torch.device("meta"):
        return network(**arguments)


def _read(path: str | PathLike[str]) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a spoilt file ends in any of a dozen kinds, of the zip reader, the unpickler or struct
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(
            f"expected a checkpoint of tensors and numbers, got {path}, which is none or needs code to be run to read "
            f"it; nothing of it was run ({reason})"
        ) from error


def _stripped(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    strange = [
        str(key) for key, value in state_dict.items() if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if strange:
        raise ValueError(f"expected tensors by name, got {len(strange)} other entries: {first_of(strange)}")
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def _name(network: ScoreNetwork | type[ScoreNetwork]) -> str:
    return (network if isinstance(network, type) else type(network)).__name__


def _described(states: object) -> str:
    if isinstance(states, list):
        return f"a list of {len(states)}: " + first_of([type(state).__name__ for state in states])
    return f"a {type(states).__name__}"
