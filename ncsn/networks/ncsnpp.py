"""The networks of the SDE family: NCSN++, DDPM++ and DDPM (Song et al. 2021, arXiv:2011.13456, appendix H).

One U-Net with attention in three dresses. Parameters are registered in the order of the official code, which names them
by numbers: so its weights and their average, a list without names, load by position (`ncsn.official`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncsn.networks.base import ACTIVATIONS, ScoreNetwork, divided
from ncsn.sde import SDE, VP, SubVP, noise_prediction

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class Fourier(nn.Module):
    """sin and cos of 2 pi W log sigma with fixed W ~ N(0, scale^2): the continuous levels of NCSN++."""

    def __init__(self, width: int, scale: float = 16.0) -> None:
        super().__init__()
        self.W = nn.Parameter(scale * torch.randn(width), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the frequencies with the weights but keep them in float32: rounded off, they would turn the phases."""
        frequencies = self.W.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not frequencies.is_meta:
            self.W.data = frequencies.to(self.W.device)
        return self

    def forward(self, sigma: Tensor) -> Tensor:
        angle = 2 * math.pi * sigma.float().log()[:, None] * self.W
        return torch.cat((angle.sin(), angle.cos()), 1)


class Positional(nn.Module):
    """sin and cos of the label at frequencies from 1 to 1 / 10,000, as of positions in transformers: DDPM's times."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2 or width < 4:
            raise ValueError(f"expected an even width >= 4, got {width}")
        self.features = width

    def forward(self, label: Tensor) -> Tensor:
        half = self.features // 2
        exponent = torch.arange(half, dtype=torch.float32, device=label.device) / (half - 1)
        angle = label.float()[:, None] * (-math.log(10_000) * exponent).exp()
        return torch.cat((angle.sin(), angle.cos()), 1)


class Attention(nn.Module):
    """Self-attention over the pixels, one head: x + out(softmax(q . k / sqrt(C)) v), q, k, v of the normalised x."""

    def __init__(self, channels: int, rescale_skips: bool) -> None:
        super().__init__()
        self.scale = math.sqrt(0.5) if rescale_skips else 1.0
        self.norm = _group_norm(channels)
        self.query, self.key, self.value = (_conv1x1(channels, channels, scale=0.1) for _ in range(3))
        self.out = _conv1x1(channels, channels, scale=0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        pixels = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.query, self.key, self.value))
        h = F.scaled_dot_product_attention(*pixels)[:, 0].transpose(1, 2).reshape(x.shape)
        return self.scale * (x + self.out(h))


class DownConv(nn.Module):
    """Half the size by a strided convolution, with a row and a column of zeros at the end; the embedding is ignored."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _initialised(nn.Conv2d(channels, channels, 3, stride=2))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class UpConv(nn.Module):
    """Twice the size by nearest neighbours and a convolution; the embedding is ignored."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3x3(channels, channels)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class DownJoin(nn.Module):
    """(x, filtered and convolved to half the size, + h) / sqrt(2): the residual input of NCSN++."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = _initialised(nn.Conv2d(in_channels, out_channels, 3, stride=2))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return math.sqrt(0.5) * (self.conv(_filtered(x, stride=1, padding=2)) + h)


class ResBlock(nn.Module):
    """norm -> act -> resample -> conv + embedding -> norm -> act -> dropout -> conv, plus the resampled shortcut."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        features: int,
        dropout: float,
        act: str,
        rescale_skips: bool,
        up: str | None = None,
        down: str | None = None,
    ) -> None:
        super().__init__()
        self.act, self.up, self.down = ACTIVATIONS[act], up, down
        self.scale = math.sqrt(0.5) if rescale_skips else 1.0
        self.norm1 = _group_norm(in_channels)
        self.conv1 = _conv3x3(in_channels, out_channels)
        self.embed = _linear(features, out_channels)
        self.norm2 = _group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv3x3(out_channels, out_channels, scale=0)
        changes = in_channels != out_channels or up is not None or down is not None
        self.shortcut: nn.Module = _conv1x1(in_channels, out_channels) if changes else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.act(self.norm1(x))
        if self.up is not None:
            h, x = (upsampled(value, self.up) for value in (h, x))
        if self.down is not None:
            h, x = (downsampled(value, self.down) for value in (h, x))
        h = self.conv1(h) + self.embed(self.act(e))[:, :, None, None]
        h = self.conv2(self.dropout(self.act(self.norm2(h))))
        return self.scale * (self.shortcut(x) + h)


@dataclass(frozen=True)
class Blocks:
    """Makes the blocks of a network, which share this."""

    features: int
    dropout: float
    act: str
    resample: str
    rescale_skips: bool

    def block(self, in_channels: int, out_channels: int, *, up: str | None = None, down: str | None = None) -> ResBlock:
        return ResBlock(
            in_channels,
            out_channels,
            features=self.features,
            dropout=self.dropout,
            act=self.act,
            rescale_skips=self.rescale_skips,
            up=up,
            down=down,
        )

    def attention(self, channels: int, wanted: bool) -> nn.Module:
        return Attention(channels, self.rescale_skips) if wanted else nn.Identity()

    def down(self, channels: int) -> nn.Module:
        return DownConv(channels) if self.resample == "conv" else self.block(channels, channels, down=self.resample)

    def up(self, channels: int) -> nn.Module:
        return UpConv(channels) if self.resample == "conv" else self.block(channels, channels, up=self.resample)


class AttendingBlock(nn.Module):
    """A ResBlock and, where it is wanted, self-attention after it."""

    def __init__(self, build: Blocks, in_channels: int, out_channels: int, *, attention: bool) -> None:
        super().__init__()
        self.res = build.block(in_channels, out_channels)
        self.attention = build.attention(out_channels, attention)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.attention(self.res(x, e))


class EncoderStage(nn.Module):
    """The blocks of a size, then half of it; `joined` are the channels of the image that joins there, 0 for none, None
    for the last stage, which keeps its size."""

    def __init__(
        self, build: Blocks, in_channels: int, out_channels: int, blocks: int, attention: bool, joined: int | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            AttendingBlock(build, out_channels if k else in_channels, out_channels, attention=attention)
            for k in range(blocks)
        )
        self.down = None if joined is None else build.down(out_channels)
        self.join = DownJoin(joined, out_channels) if joined else None

    def forward(self, h: Tensor, x: Tensor, e: Tensor, skips: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Appends to skips what the decoder sees; returns what goes on, and the image that joins at the next stage."""
        for block in self.blocks:
            h = block(h, e)
            skips.append(h)
        if self.down is not None:
            h = self.down(h, e)
            if self.join is not None:
                h = x = self.join(x, h)
            skips.append(h)
        return h, x


class DecoderStage(nn.Module):
    """The blocks of a size, each with an output of the encoder, attention, then twice the size where that is wanted."""

    def __init__(
        self, build: Blocks, in_channels: int, out_channels: int, skips: Sequence[int], attention: bool, up: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            build.block((out_channels if k else in_channels) + skip, out_channels) for k, skip in enumerate(skips)
        )
        self.attention = build.attention(out_channels, attention)
        self.up = build.up(out_channels) if up else None

    def forward(self, h: Tensor, e: Tensor, skips: list[Tensor]) -> Tensor:
        for block in self.blocks:
            h = block(torch.cat((h, skips.pop()), 1), e)
        h = self.attention(h)
        return h if self.up is None else self.up(h, e)


class DiffusionUNet(nn.Module):
    """The U-Net of DDPM (arXiv:2006.11239, appendix B) with the changes of arXiv:2011.13456, appendix H, as options.

    Encoder: conv; at each size blocks, which the decoder sees, then half the size; two blocks with attention between
    at the smallest; decoder: at each size one block more, each with the encoder's output joined to it, then twice the
    size; norm, act, conv. Every block sees the embedding of the noise.

    Args:
        embedding: Noise, shape (B,), to features, shape (B, inputs).
        inputs: How many features the embedding has.
        channels: Of the image, C.
        width: Channels at full size; the embedding's layers have four times as many.
        multipliers: Channels at each size, in multiples of the width.
        blocks: In the encoder at each size.
        attention: At which sizes blocks of attention follow, 0 for the full size, 1 for half of it, ...
        dropout: Probability, in each block.
        act: Activation.
        resample: "conv": strided convolutions and nearest neighbours with a convolution between the blocks, as DDPM;
            "mean" and "fir": within blocks as BigGAN, by means and nearest neighbours, or by a filter [1, 3, 3, 1].
        residual_input: Add the image, resampled and convolved, at each smaller size of the encoder.
        rescale_skips: Divide sums of a block by sqrt(2).
    """

    def __init__(
        self,
        embedding: nn.Module,
        inputs: int,
        *,
        channels: int,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        dropout: float,
        act: str,
        resample: str,
        residual_input: bool,
        rescale_skips: bool,
    ) -> None:
        super().__init__()
        if not multipliers or min(multipliers) < 1 or blocks < 1:
            raise ValueError(f"expected multipliers and blocks >= 1, got {tuple(multipliers)} and blocks={blocks}")
        if not all(0 <= k < len(multipliers) for k in attention):
            allowed = ", ".join(map(str, range(len(multipliers))))
            raise ValueError(f"expected attention at sizes of {allowed}, got {tuple(attention)}")
        if not 0 <= dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1, got {dropout}")
        self.act = ACTIVATIONS[act]
        features = 4 * width
        build = Blocks(features=features, dropout=dropout, act=act, resample=resample, rescale_skips=rescale_skips)
        self.embedding = embedding
        self.linear1 = _linear(inputs, features)
        self.linear2 = _linear(features, features)
        self.begin_conv = _conv3x3(channels, width)
        widths = [m * width for m in multipliers]
        c, joined, skips, stages = width, channels if residual_input else 0, [width], len(widths)
        self.encoder = nn.ModuleList()
        for k, out in enumerate(widths):
            last = k == stages - 1
            self.encoder.append(EncoderStage(build, c, out, blocks, k in attention, None if last else joined))
            c, joined = out, out if residual_input else 0
            skips += [c] * (blocks + (not last))
        self.bottleneck1 = AttendingBlock(build, c, c, attention=True)
        self.bottleneck2 = build.block(c, c)
        self.decoder = nn.ModuleList()  # registered after them: the official order
        for k, out in zip(reversed(range(stages)), reversed(widths), strict=True):
            joining = [skips.pop() for _ in range(blocks + 1)]
            self.decoder.append(DecoderStage(build, c, out, joining, k in attention, k > 0))
            c = out
        self.normalizer = _group_norm(c)
        self.end_conv = _conv3x3(c, channels, scale=0)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Images, shape (B, C, H, W), and what tells their noise, shape (B,), to an output like the images."""
        e = self.linear2(self.act(self.linear1(self.embedding(noise).to(x.dtype))))
        h = self.begin_conv(x)
        skips = [h]
        for stage in self.encoder:
            h, x = stage(h, x, e, skips)
        h = self.bottleneck2(self.bottleneck1(h, e), e)
        for stage in self.decoder:
            h = stage(h, e, skips)
        return self.end_conv(self.act(self.normalizer(h)))


class NCSNpp(ScoreNetwork):
    """NCSN++, s(x, sigma) = f(x, sigma) / sigma: for VE, with residual input and filtered resampling (appendix H.2).

    Args:
        channels: Of the image, C.
        width: Channels at full size; 128 as published.
        multipliers: Channels at each size, in multiples of the width; (1, 2, 2, 2) for 32x32.
        blocks: At each size; 4, in the deep network 8.
        attention: At which sizes, 0 the full one; (1,), 16x16 of 32x32.
        dropout: In each block; 0.1 as published.
        sigmas: The levels of a network that is told their number by `Positional` (discrete SMLD), shape (L,),
            decreasing. None: any sigma, by `Fourier` of its logarithm.
        act: "swish" as published, or "elu", "relu", "lrelu".
        rescale: Map pixels from [0, 1] to [-1, 1] first; False if the data are so already.

    Raises:
        ValueError: If an argument is out of its range.
    """

    sigmas: Tensor

    def __init__(
        self,
        *,
        channels: int,
        width: int,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (1,),
        dropout: float = 0.1,
        sigmas: Tensor | Sequence[float] | None = None,
        act: str = "swish",
        rescale: bool = True,
    ) -> None:
        super().__init__(channels=channels, width=width, act=act, rescale=rescale)
        self.multiple = 2 ** (len(multipliers) - 1)
        self.unet = DiffusionUNet(
            *((Fourier(width), 2 * width) if sigmas is None else (Positional(width), width)),
            channels=channels,
            width=width,
            multipliers=multipliers,
            blocks=blocks,
            attention=attention,
            dropout=dropout,
            act=act,
            resample="fir",
            residual_input=True,
            rescale_skips=True,
        )
        levels = None if sigmas is None else torch.as_tensor(sigmas, dtype=torch.float64)
        self.register_buffer("sigmas", levels, persistent=False)

    def _score(self, h: Tensor, sigma: Tensor) -> Tensor:
        if self.sigmas is None:
            return divided(self.unet(h, sigma), sigma)
        label = (sigma.double().log()[:, None] - self.sigmas.log()).abs().argmin(1)
        return divided(self.unet(h, label), sigma)


class DDPMpp(ScoreNetwork):
    """DDPM++: NCSN++ without filters and residual input, told the time, for VP and sub-VP (appendix H.2).

    s(x, sigma) = -n(alpha x, label) / sigma with a U-Net n that predicts noise. The units of the SDE are those of
    images in [-1, 1]: with `rescale` its noise level is twice sigma.

    Args:
        channels: Of the image, C.
        width: Channels at full size; 128 as published.
        multipliers: Channels at each size, in multiples of the width; (1, 2, 2, 2) for 32x32.
        blocks: At each size; 4, in the deep network 8.
        attention: At which sizes, 0 the full one; (1,), 16x16 of 32x32.
        dropout: In each block; 0.1 as published.
        sde: "vp" or "subvp"; the label is 999 t.
        beta_min: Of the SDE.
        beta_max: Of the SDE.
        steps: N of a discrete chain, whose step is the label then; None: continuous time.
        act: "swish" as published, or "elu", "relu", "lrelu".
        rescale: Map pixels from [0, 1] to [-1, 1] first; False if the data are so already.

    Raises:
        ValueError: If an argument is out of its range.
    """

    levels: Tensor | None
    resample, rescale_skips = "mean", True

    def __init__(
        self,
        *,
        channels: int,
        width: int,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (1,),
        dropout: float = 0.1,
        sde: str = "vp",
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        steps: int | None = None,
        act: str = "swish",
        rescale: bool = True,
    ) -> None:
        super().__init__(channels=channels, width=width, act=act, rescale=rescale)
        if sde not in ("vp", "subvp"):
            raise ValueError(f"expected sde='vp' or 'subvp' for a network that predicts noise, got {sde!r}")
        self.multiple = 2 ** (len(multipliers) - 1)
        self.sde: SDE = VP(beta_min, beta_max) if sde == "vp" else SubVP(beta_min, beta_max)
        self.register_buffer("levels", None if steps is None else self.sde.levels(steps), persistent=False)
        self.unet = DiffusionUNet(
            Positional(width),
            width,
            channels=channels,
            width=width,
            multipliers=multipliers,
            blocks=blocks,
            attention=attention,
            dropout=dropout,
            act=act,
            resample=self.resample,
            residual_input=False,
            rescale_skips=self.rescale_skips,
        )

    def _score(self, h: Tensor, sigma: Tensor) -> Tensor:
        unit = 2 if self.rescale else 1
        return unit * noise_prediction(self.unet, self.sde, levels=self.levels)(h, unit * sigma)


class DDPM(DDPMpp):
    """The U-Net of DDPM (arXiv:2006.11239); arguments as `DDPMpp`, of which `blocks` is 2 as published."""

    resample, rescale_skips = "conv", False

    def __init__(self, *, blocks: int = 2, **arguments: object) -> None:
        super().__init__(blocks=blocks, **arguments)  # type: ignore[arg-type]


def upsampled(x: Tensor, how: str) -> Tensor:
    """Twice the size, by nearest neighbours ("mean") or a filter after zeros between the pixels ("fir")."""
    if how == "mean":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return F.conv_transpose2d(x, 4 * _kernel(x), stride=2, padding=1, groups=x.shape[1])


def downsampled(x: Tensor, how: str) -> Tensor:
    """Half the size, by the means of 2x2 pixels ("mean") or a filter ("fir")."""
    return F.avg_pool2d(x, 2) if how == "mean" else _filtered(x, stride=2, padding=1)


def _filtered(x: Tensor, *, stride: int, padding: int) -> Tensor:
    return F.conv2d(x, _kernel(x), stride=stride, padding=padding, groups=x.shape[1])


def _kernel(x: Tensor) -> Tensor:
    """The filter [1, 3, 3, 1] of arXiv:1812.04948 for each channel of x, shape (C, 1, 4, 4), which sums to 1; made on
    the device, since a copy to it would wait for it."""
    k = torch.arange(4, dtype=x.dtype, device=x.device)
    row = 1 + k * (3 - k)
    square = row[:, None] * row
    return (square / square.sum()).expand(x.shape[1], 1, -1, -1)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(min(channels // 4, 32), channels), channels, eps=1e-6)


def _conv3x3(in_channels: int, out_channels: int, scale: float = 1.0) -> nn.Conv2d:
    return _initialised(nn.Conv2d(in_channels, out_channels, 3, padding=1), scale)


def _conv1x1(in_channels: int, out_channels: int, scale: float = 1.0) -> nn.Conv2d:
    return _initialised(nn.Conv2d(in_channels, out_channels, 1), scale)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return _initialised(nn.Linear(inputs, outputs))


def _initialised(layer: Layer, scale: float = 1.0) -> Layer:
    """Uniform weights of the variance scale / mean of fan in and fan out, no bias; a scale of 0 counts as 1e-10."""
    nn.init.xavier_uniform_(layer.weight, math.sqrt(max(scale, 1e-10)))
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
