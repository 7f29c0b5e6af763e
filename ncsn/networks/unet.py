"""A small U-Net that sees the noise level: the network of the comparison of noise schedules."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncsn.networks.base import ACTIVATIONS, ScoreNetwork, divided
from ncsn.networks.refinenet import conv3x3


class UNet(ScoreNetwork):
    """s(x, sigma) = f(x, sigma) / sigma, f a U-Net with an embedding of log sigma in every block.

    Encoder: conv, then at each size a ResBlock and a strided convolution; a ResBlock at the smallest size; decoder:
    nearest upsampling, the encoder's output at that size joined to it, a ResBlock. Any sigma > 0 is allowed: the
    embedding is a function of its logarithm, not of a level's number.

    Args:
        channels: Of the image, C.
        width: Channels at full size.
        multipliers: Channels at each size, in multiples of the width; the size halves between them, so `multiple` is
            2^(len(multipliers) - 1).
        act: "swish", or "elu", "relu", "lrelu".
        rescale: Map pixels from [0, 1] to [-1, 1] first; False if the data are rescaled or logits already.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        *,
        channels: int,
        width: int,
        multipliers: Sequence[int] = (1, 2, 2),
        act: str = "swish",
        rescale: bool = True,
    ) -> None:
        super().__init__(channels=channels, width=width, act=act, rescale=rescale)
        if not multipliers or min(multipliers) < 1:
            raise ValueError(f"expected one multiplier or more, each >= 1, got {tuple(multipliers)}")
        self.multiple = 2 ** (len(multipliers) - 1)
        *widths, bottom = [m * width for m in multipliers]
        features = 4 * width
        self.embedding = NoiseEmbedding(width, features, act)
        self.begin_conv = conv3x3(channels, width)
        self.encoder, self.down = nn.ModuleList(), nn.ModuleList()
        c = width
        for k in widths:
            self.encoder.append(EmbeddedResBlock(c, k, features, act))
            self.down.append(nn.Conv2d(k, k, 3, stride=2, padding=1))
            c = k
        self.bottleneck = EmbeddedResBlock(c, bottom, features, act)
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        c = bottom
        for k in reversed(widths):
            self.up.append(conv3x3(c, k))
            self.decoder.append(EmbeddedResBlock(2 * k, k, features, act))
            c = k
        self.normalizer = _group_norm(c)
        self.end_conv = conv3x3(c, channels)

    def _score(self, h: Tensor, sigma: Tensor) -> Tensor:
        e = self.embedding(sigma.to(h.dtype))
        h = self.begin_conv(h)
        skips = []
        for block, down in zip(self.encoder, self.down, strict=True):
            h = block(h, e)
            skips.append(h)
            h = down(h)
        h = self.bottleneck(h, e)
        for up, block, skip in zip(self.up, self.decoder, reversed(skips), strict=True):
            h = up(F.interpolate(h, scale_factor=2, mode="nearest"))
            h = block(torch.cat((h, skip), 1), e)
        return divided(self.end_conv(self.act(self.normalizer(h))), sigma)


class NoiseEmbedding(nn.Module):
    """Sines and cosines of log sigma at `width` frequencies from 1/4 to 16, then two layers: (B,) -> (B, features)."""

    frequencies: Tensor

    def __init__(self, width: int, features: int, act: str) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.register_buffer("frequencies", torch.logspace(-2, 4, width, base=2), persistent=False)
        self.linear1 = nn.Linear(2 * width, features)
        self.linear2 = nn.Linear(features, features)

    def forward(self, sigma: Tensor) -> Tensor:
        angle = sigma.log()[:, None] * self.frequencies
        return self.linear2(self.act(self.linear1(torch.cat((angle.sin(), angle.cos()), 1))))


class EmbeddedResBlock(nn.Module):
    """norm -> act -> conv -> norm, scaled and shifted by the embedding -> act -> conv, plus a shortcut.

    The embedding comes after the norm, which would take away part of what is added before it.
    """

    def __init__(self, in_channels: int, out_channels: int, features: int, act: str) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.norm1 = _group_norm(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.embed = nn.Linear(features, 2 * out_channels)
        self.norm2 = _group_norm(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        same = in_channels == out_channels
        self.shortcut: nn.Module = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.embed(self.act(e))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(self.conv1(self.act(self.norm1(x))))
        return self.conv2(self.act((1 + scale) * h + shift)) + self.shortcut(x)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, math.gcd(16, channels) // 2), channels)  # at most 8 groups, of 2 channels or more
