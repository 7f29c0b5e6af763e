"""NCSN (Song & Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution", arXiv:1907.05600)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor

from ncsn.networks.refinenet import DEEPER, ConditionalInstanceNorm, RefineNetwork
from ncsn.noise import given_sigmas

TOLERANCE = 1e-3  # relative distance from a level up to which a sigma is that level


class NCSN(RefineNetwork):
    """The RefineNet whose norms, in every block, have their own coefficients for each noise level.

    The output is the score itself, not divided by sigma. The keys of the state dict are those of the official
    checkpoints, which keep no noise levels: `sigmas` is no part of it.

    Args:
        channels: Of the image, C.
        width: Channels of the first stage (`ngf` in the official code; 64 for MNIST, 128 for its 32x32 models).
        sigmas: The noise levels, shape (L,), strictly decreasing, more than 0.1 % apart.
        act: "elu" as published, or "relu", "lrelu", "swish".
        rescale: Map pixels from [0, 1] to [-1, 1] first; False if the data are rescaled or logits already.
        norm: "instance++" as published, or "instance", which leaves the contrast of the channels' means out.

    Raises:
        ValueError: If an argument is out of its range; on a call, also if a sigma is off every level by more than
            0.1 %. That is asked on a CPU only: elsewhere the answer would have to be waited for at every step, and
            the scores of such images are NaN instead.
    """

    sigmas: Tensor

    def __init__(
        self,
        *,
        channels: int,
        width: int,
        sigmas: Tensor | Sequence[float],
        act: str = "elu",
        rescale: bool = True,
        norm: str = "instance++",
    ) -> None:
        if norm not in ("instance++", "instance"):
            raise ValueError(f"expected norm to be 'instance++' or 'instance', got {norm!r}")
        levels = given_sigmas(sigmas)
        if (levels[1:] * (1 + TOLERANCE) > levels[:-1]).any():
            raise ValueError(f"expected sigmas that differ by more than {TOLERANCE:.1%}, got {levels.tolist()}")
        make = partial(ConditionalInstanceNorm, levels=len(levels), plus=norm == "instance++")
        super().__init__(
            channels=channels, width=width, act=act, rescale=rescale, norm=make, refine_norm=make, pool="avg"
        )
        self.register_buffer("sigmas", levels.float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the levels with the weights but do not cast them: bfloat16 would round them off by 0.4 %."""
        levels = self.sigmas
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not levels.is_meta:
            self.sigmas = levels.to(self.sigmas.device)
        return self

    def _score(self, h: Tensor, sigma: Tensor) -> Tensor:
        ratio = (sigma[:, None] / self.sigmas).log().abs()  # (B, L)
        distance, y = ratio.min(1)
        off = ~(distance <= TOLERANCE)  # NaN is off, too
        if off.device.type == "cpu" and off.any():
            value, top, bottom = float(sigma[off][0]), float(self.sigmas[0]), float(self.sigmas[-1])
            raise ValueError(
                f"expected each sigma to be one of the network's {len(self.sigmas)} levels from {top:.6g} to "
                f"{bottom:.6g}, got {value:.6g}: sample and train with the levels the network was made for"
            )
        return self.trunk(h, y).masked_fill(off[:, None, None, None], torch.nan)


class NCSNDeeper(NCSN):
    """NCSN with five stages, two of them at lower resolutions, for larger images; arguments as `NCSN`.

    With norm="instance++" it is `NCSNdeeper` of ermongroup/ncsnv2, with "instance" `CondRefineNetDeeperDilated` of
    ermongroup/ncsn.
    """

    stages = DEEPER
    multiple = 4
