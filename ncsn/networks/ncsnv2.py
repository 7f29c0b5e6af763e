"""NCSNv2 (Song & Ermon, "Improved Techniques for Training Score-Based Generative Models", arXiv:2006.09011)."""

from torch import Tensor

from ncsn.networks.base import divided
from ncsn.networks.refinenet import DEEPER, DEEPEST, InstanceNormPlus, NoNorm, RefineNetwork


class NCSNv2(RefineNetwork):
    """The unconditional RefineNet, divided by the noise level (Technique 3).

    s(x, sigma) = f(x) / sigma: the noise level enters nowhere else, so the parameters do not depend on the number of
    levels. Four encoder stages (the second halves the resolution, the third and fourth dilate by 2 and 4 instead) and
    four RefineBlocks. The keys of the state dict are those of the official checkpoints, less their `sigmas` buffer.

    Args:
        channels: Of the image, C.
        width: Channels of the first stage (`ngf` in the official code; 128 for its 32x32 and 64x64 models).
        act: "elu" as published, or "relu", "lrelu", "swish".
        rescale: Map pixels from [0, 1] to [-1, 1] first; False if the data are rescaled or logits already.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, *, channels: int, width: int, act: str = "elu", rescale: bool = True) -> None:
        super().__init__(
            channels=channels,
            width=width,
            act=act,
            rescale=rescale,
            norm=InstanceNormPlus,
            refine_norm=NoNorm,
            pool="max",
        )

    def _score(self, h: Tensor, sigma: Tensor) -> Tensor:
        return divided(self.trunk(h), sigma)


class NCSNv2Deeper(NCSNv2):
    """NCSNv2 with five stages, two of them at lower resolutions, for 96x96 and 128x128; arguments as `NCSNv2`."""

    stages = DEEPER
    multiple = 4


class NCSNv2Deepest(NCSNv2):
    """NCSNv2 with six stages, three of them at lower resolutions, for 256x256; arguments as `NCSNv2`."""

    stages = DEEPEST
    multiple = 8
