"""ResScore, the network of Figure 1 of arXiv:1907.05600: sliced score matching without noise and with a little."""

from torch import Tensor, nn

from ncsn.networks.base import ACTIVATIONS, ScoreNetwork
from ncsn.networks.refinenet import conv3x3


class ResScore(ScoreNetwork):
    """A residual autoencoder without skips; sigma is ignored, so it models the score at one noise level.

    Widths c, c, 2c (half the size), 2c, 4c (a quarter), 4c, and back by transposed convolutions. Parameters and cost
    are those of the official class, from which the places of the strides are inferred.

    Args:
        channels: Of the image, C.
        width: c, a multiple of 8, the number of groups of each GroupNorm.
        act: "elu" as published, or "relu", "lrelu", "swish".
        rescale: Map pixels from [0, 1] to [-1, 1] first.

    Raises:
        ValueError: If an argument is out of its range.
    """

    multiple = 4

    def __init__(self, *, channels: int, width: int = 32, act: str = "elu", rescale: bool = True) -> None:
        super().__init__(channels=channels, width=width, act=act, rescale=rescale)
        if width % 8:
            raise ValueError(f"expected width to be a multiple of 8, got {width}")
        c = width
        self.begin_conv = conv3x3(channels, c)
        self.blocks = nn.Sequential(
            Block(c, c, act),
            Block(c, 2 * c, act, resample="down"),
            Block(2 * c, 2 * c, act),
            Block(2 * c, 4 * c, act, resample="down"),
            Block(4 * c, 4 * c, act),
            Block(4 * c, 4 * c, act),
            Block(4 * c, 2 * c, act, resample="up"),
            Block(2 * c, 2 * c, act),
            Block(2 * c, c, act, resample="up"),
            Block(c, c, act),
        )
        self.end_conv = conv3x3(c, channels)

    def _score(self, h: Tensor, sigma: Tensor) -> Tensor:
        return self.end_conv(self.blocks(self.act(self.begin_conv(h))))


class Block(nn.Module):
    """conv -> GroupNorm -> act -> conv -> GroupNorm, plus a shortcut, then act: (B, in, H, W) -> (B, out, H', W').

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        act: Name of the activation, one of `ACTIVATIONS`.
        resample: None, "down" (half the size, by a stride) or "up" (twice the size, by a transposed convolution).
    """

    def __init__(self, in_channels: int, out_channels: int, act: str, *, resample: str | None = None) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]

        def down(c: int) -> nn.Module:
            return nn.Conv2d(in_channels, c, 3, stride=2, padding=1)

        def up(c: int) -> nn.Module:
            return nn.ConvTranspose2d(in_channels, c, 3, stride=2, padding=1, output_padding=1)

        self.conv1 = down(in_channels) if resample == "down" else conv3x3(in_channels, in_channels)
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv2 = up(out_channels) if resample == "up" else conv3x3(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if resample is not None:
            self.shortcut = down(out_channels) if resample == "down" else up(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act(h + self.shortcut(x))
