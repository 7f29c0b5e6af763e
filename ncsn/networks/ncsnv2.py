"""NCSNv2 (Song & Ermon, "Improved Techniques for Training Score-Based Generative Models", arXiv:2006.09011)."""

from torch import Tensor, nn

from ncsn.networks.refinenet import ACTIVATIONS, InstanceNormPlus, RefineBlock, ResBlock, conv3x3


class NCSNv2(nn.Module):
    """The unconditional RefineNet, divided by the noise level (Technique 3).

    s(x, sigma) = f(x) / sigma: the noise level enters nowhere else, so the parameters do not depend on the number of
    levels. Four encoder stages (the second halves the resolution, the third and fourth dilate by 2 and 4 instead) and
    four RefineBlocks. The keys of the state dict are those of the official checkpoints, less their `sigmas` buffer.

    Args:
        channels: Of the image, C.
        width: Channels of the first stage (`ngf` in the official code; 128 for its 32x32 and 64x64 models).
        act: "elu" as published, or "relu", "lrelu", "swish".

    Raises:
        ValueError: If an argument is out of its range.
    """

    multiple = 2  # height and width must be multiples of this

    def __init__(self, *, channels: int, width: int, act: str = "elu") -> None:
        super().__init__()
        if channels < 1 or width < 2:
            raise ValueError(f"expected channels >= 1 and width >= 2, got channels={channels}, width={width}")
        if act not in ACTIVATIONS:
            raise ValueError(f"expected act to be one of {', '.join(ACTIVATIONS)}, got {act!r}")
        c = width
        self.act = ACTIVATIONS[act]
        self.begin_conv = conv3x3(channels, c)
        self.normalizer = InstanceNormPlus(c)
        self.end_conv = conv3x3(c, channels)
        self.res1 = nn.Sequential(ResBlock(c, c, act), ResBlock(c, c, act))
        self.res2 = nn.Sequential(ResBlock(c, 2 * c, act, down=True), ResBlock(2 * c, 2 * c, act))
        self.res3 = nn.Sequential(
            ResBlock(2 * c, 2 * c, act, down=True, dilation=2), ResBlock(2 * c, 2 * c, act, dilation=2)
        )
        self.res4 = nn.Sequential(
            ResBlock(2 * c, 2 * c, act, down=True, dilation=4), ResBlock(2 * c, 2 * c, act, dilation=4)
        )
        self.refine1 = RefineBlock((2 * c,), 2 * c, act)
        self.refine2 = RefineBlock((2 * c, 2 * c), 2 * c, act)
        self.refine3 = RefineBlock((2 * c, 2 * c), c, act)
        self.refine4 = RefineBlock((c, c), c, act, last=True)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The score of the data perturbed by sigma.

        Args:
            x: Images in [0, 1] plus noise, shape (B, C, H, W), H and W even.
            sigma: Noise levels (values, not indices) in pixel units, shape (B,).

        Returns:
            s(x, sigma), shape and dtype of x.

        Raises:
            ValueError: If H or W is odd, or sigma has another shape than (B,).
        """
        if any(n % self.multiple for n in x.shape[2:]):
            raise ValueError(f"expected height and width to be multiples of {self.multiple}, got {tuple(x.shape[2:])}")
        if sigma.shape != x.shape[:1]:
            raise ValueError(f"expected one sigma an image, shape ({len(x)},), got {tuple(sigma.shape)}")
        h = self.begin_conv(2 * x - 1)
        h1 = self.res1(h)
        h2 = self.res2(h1)
        h3 = self.res3(h2)
        h4 = self.res4(h3)
        h = self.refine1(h4)
        h = self.refine2(h3, h)
        h = self.refine3(h2, h)
        h = self.refine4(h1, h)
        f = self.end_conv(self.act(self.normalizer(h)))
        return f / sigma[:, None, None, None]
