"""The blocks of the RefineNet score networks (Song & Ermon 2019, 2020), shared by NCSN and NCSNv2.

Legend: B batch, C channels, H, W height and width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "relu": F.relu,
    "lrelu": lambda x: F.leaky_relu(x, 0.2),
    "swish": F.silu,
}


class InstanceNormPlus(nn.Module):
    """InstanceNorm++ (arXiv:1907.05600, appendix A; the official code, where gamma multiplies both terms).

    out_k = gamma_k ((x_k - mu_k) / s_k + alpha_k t_k) + beta_k, with mu_k and s_k the spatial mean and deviation of
    channel k and t_k = (mu_k - mean_k mu) / sqrt(var_k mu + 1e-5): what InstanceNorm forgets, the contrast between
    the means of the channels, is put back. The variance over channels is the unbiased one.

    Args:
        channels: C, at least 2 (the variance over one channel is undefined).

    Raises:
        ValueError: If channels < 2.
    """

    eps = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"expected channels >= 2 for InstanceNorm++, got {channels}")
        self.alpha = nn.Parameter(torch.empty(channels).normal_(1, 0.02))
        self.gamma = nn.Parameter(torch.empty(channels).normal_(1, 0.02))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mu = x.mean((2, 3))  # (B, C); two plain means, since torch.var_mean is several times slower on CPUs
        var = (x - mu[:, :, None, None]).square().mean((2, 3))
        v, m = torch.var_mean(mu, dim=1, keepdim=True)  # (B, 1)
        t = (mu - m) * torch.rsqrt(v + self.eps)
        # One affine map of x: gamma ((x - mu) / s + alpha t) + beta = scale x + shift, a single pass over the image.
        scale = self.gamma * torch.rsqrt(var + self.eps)
        shift = self.gamma * self.alpha * t + self.beta - scale * mu
        return torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])


def conv3x3(in_channels: int, out_channels: int, *, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=bias)


class ConvMeanPool(nn.Module):
    """A convolution, then the mean of each 2x2 square: (B, in, H, W) -> (B, out, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(x), 2)


class ResBlock(nn.Module):
    """norm -> act -> conv -> norm -> act -> conv, plus a shortcut.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; only a `down` block may change them.
        act: Name of the activation, one of `ACTIVATIONS`.
        down: Halve the resolution. With a dilation it stays: the dilation takes the place of the pooling, and the
            shortcut is a dilated 3x3 convolution (so in the official code).
        dilation: Of every 3x3 convolution of the block.

    Raises:
        ValueError: If the channels change without `down`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, act: str, *, down: bool = False, dilation: int | None = None
    ) -> None:
        super().__init__()
        if in_channels != out_channels and not down:
            raise ValueError(f"expected equal channels in a block without down, got {in_channels} -> {out_channels}")
        pool = down and dilation is None
        mid_channels = in_channels if pool else out_channels
        d = dilation or 1
        self.act = ACTIVATIONS[act]
        self.conv1 = conv3x3(in_channels, mid_channels, dilation=d)
        self.normalize2 = InstanceNormPlus(mid_channels)
        self.conv2 = (
            ConvMeanPool(mid_channels, out_channels, 3) if pool else conv3x3(mid_channels, out_channels, dilation=d)
        )
        self.shortcut: nn.Module
        if pool:
            self.shortcut = ConvMeanPool(in_channels, out_channels, 1)
        else:
            self.shortcut = conv3x3(in_channels, out_channels, dilation=d) if down else nn.Identity()
        self.normalize1 = InstanceNormPlus(in_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.act(self.normalize1(x)))
        h = self.conv2(self.act(self.normalize2(h)))
        return h + self.shortcut(x)


class ResidualConvUnit(nn.Module):
    """RCU: `blocks` times x <- x + (act -> conv -> act -> conv)(x), convolutions without bias."""

    def __init__(self, features: int, blocks: int, act: str) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.names = [(f"{b}_1_conv", f"{b}_2_conv") for b in range(1, blocks + 1)]  # the keys of official checkpoints
        for name in (name for pair in self.names for name in pair):
            self.add_module(name, conv3x3(features, features, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in self.names:
            h = self.get_submodule(first)(self.act(x))
            x = x + self.get_submodule(second)(self.act(h))
        return x


class ChainedResidualPooling(nn.Module):
    """CRP: x <- act(x), then twice p <- conv(pool5(p)) with x <- x + p, starting from p = x; max pooling, no bias."""

    def __init__(self, features: int, act: str, stages: int = 2) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.convs = nn.ModuleList(conv3x3(features, features, bias=False) for _ in range(stages))

    def forward(self, x: Tensor) -> Tensor:
        x = path = self.act(x)
        for conv in self.convs:
            path = conv(F.max_pool2d(path, 5, stride=1, padding=2))
            x = x + path
        return x


class MultiResolutionFusion(nn.Module):
    """MSF: the sum of conv(x_i), each brought to the size of the output by bilinear interpolation (corners aligned)."""

    def __init__(self, in_channels: tuple[int, ...], features: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv3x3(c, features) for c in in_channels)

    def forward(self, xs: tuple[Tensor, ...], size: torch.Size) -> Tensor:
        fused = [conv(x) for conv, x in zip(self.convs, xs, strict=True)]
        scaled = [
            F.interpolate(h, size, mode="bilinear", align_corners=True) if h.shape[2:] != size else h for h in fused
        ]
        return sum(scaled[1:], scaled[0])


class RefineBlock(nn.Module):
    """RCU on each input, MSF, CRP, RCU: joins a layer of the encoder with the decoder's path from below.

    Args:
        in_channels: Of each input; one input (the deepest block) skips the fusion.
        features: Channels of the output.
        act: Name of the activation, one of `ACTIVATIONS`.
        last: The last block ends with an RCU of 3 blocks instead of 1.
    """

    def __init__(self, in_channels: tuple[int, ...], features: int, act: str, *, last: bool = False) -> None:
        super().__init__()
        self.adapt_convs = nn.ModuleList(ResidualConvUnit(c, 2, act) for c in in_channels)
        self.output_convs = ResidualConvUnit(features, 3 if last else 1, act)
        if len(in_channels) > 1:
            self.msf = MultiResolutionFusion(in_channels, features)
        self.crp = ChainedResidualPooling(features, act)

    def forward(self, *xs: Tensor) -> Tensor:
        """Inputs (B, in_channels[i], H_i, W_i), the first of the output's size; output (B, features, H_0, W_0)."""
        adapted = tuple(adapt(x) for adapt, x in zip(self.adapt_convs, xs, strict=True))
        h = self.msf(adapted, xs[0].shape[2:]) if len(adapted) > 1 else adapted[0]
        return self.output_convs(self.crp(h))
