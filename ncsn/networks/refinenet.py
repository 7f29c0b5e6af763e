"""The RefineNet score networks (Song & Ermon 2019, 2020): blocks and trunk, shared by NCSN, NCSNv2 and the baseline.

Legend: B batch, C channels, H, W height and width; y the number of each image's noise level, shape (B,), None in
networks whose norms do not depend on it.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncsn.networks.base import ACTIVATIONS, ScoreNetwork

Norm = Callable[[int], nn.Module]  # channels -> module(x, y)


def instance_norm(x: Tensor, gamma: Tensor, beta: Tensor, alpha: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """InstanceNorm++ (arXiv:1907.05600, appendix A; the official code, where gamma multiplies both terms).

    out_k = gamma_k ((x_k - mu_k) / s_k + alpha_k t_k) + beta_k, with mu_k and s_k the spatial mean and deviation of
    channel k and t_k = (mu_k - mean_k mu) / sqrt(var_k mu + eps): what InstanceNorm forgets, the contrast between
    the means of the channels, is put back. The variance over channels is the unbiased one.

    Args:
        x: Shape (B, C, H, W).
        gamma: Shape (C,) or (B, C), as beta and alpha.
        beta: Shift.
        alpha: Of the contrast; None leaves the plain InstanceNorm.
        eps: Added to each variance.

    Returns:
        Shape and dtype of x; statistics are at least float32.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _normalised(x, gamma, beta, alpha, eps)[0]  # they make, and fuse, the gradient themselves
    out: Tensor = _InstanceNorm.apply(x, gamma, beta, alpha, eps)
    return out


def _normalised(
    x: Tensor, gamma: Tensor, beta: Tensor, alpha: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """What `instance_norm` returns; mu and 1 / s, shape (B, C); t, (B, C), with 1 / sqrt(var_k mu + eps), (B, 1)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    mu = x.mean((2, 3), dtype=dtype)  # two plain means, since torch.var_mean is several times slower on CPUs
    r = torch.rsqrt((x - mu[:, :, None, None]).square_().mean((2, 3)) + eps)
    contrast: tuple[Tensor, ...] = ()
    if alpha is not None:
        v, m = torch.var_mean(mu, dim=1, keepdim=True)  # (B, 1)
        q = torch.rsqrt(v + eps)
        t = (mu - m) * q
        beta = gamma * alpha * t + beta
        contrast = t, q
    # One affine map of x: gamma (x - mu) / s + beta = scale x + shift, a single pass over the image.
    scale = gamma * r
    shift = beta - scale * mu
    out = torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None]).to(x.dtype)
    return out, mu, r, contrast


class _InstanceNorm(torch.autograd.Function):
    """`instance_norm` with its gradient in closed form.

    Left to itself, autograd walks over the image some twenty times and keeps x - mu beside x (docs/performance.md).
    It does where the gradient is to be differentiated in turn, as by sliced score matching.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, alpha: Tensor | None, eps: float) -> Tensor:
        out, mu, r, contrast = _normalised(x, gamma, beta, alpha, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, gamma, beta, alpha, mu, r, *contrast)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, alpha, mu, r, *contrast = ctx.saved_tensors
        if torch.is_grad_enabled():
            needed = ctx.needs_input_grad[:4]
            inputs = [each for each, need in zip((x, gamma, beta, alpha), needed, strict=True) if need]
            out = _normalised(x, gamma, beta, alpha, ctx.eps)[0]
            gradients = iter(torch.autograd.grad(out, inputs, g, create_graph=True))
            return *(next(gradients) if need else None for need in needed), None
        total = g.sum((2, 3), dtype=mu.dtype)  # that of beta in each image
        along = (x - mu[:, :, None, None]).mul_(g).sum((2, 3)) * r  # that of gamma, without the contrast
        scale, n = gamma * r, g[0, 0].numel()
        to_gamma, to_mu, to_alpha = along, scale * total, None
        if contrast:
            t, q = contrast
            to_alpha = gamma * t * total
            to_gamma = along + alpha * t * total
            to_t = gamma * alpha * total
            to_mu -= q * (to_t - to_t.mean(1, keepdim=True) - t * (to_t * t).sum(1, keepdim=True) / (t.shape[1] - 1))
            to_alpha = to_alpha.sum_to_size(alpha.shape)
        # scale (g - mean g - (x - mu) / s^2 mean g (x - mu)), and the mean's part in t
        slope = scale * r * along / -n
        constant = to_mu / -n - slope * mu
        to_x = torch.addcmul(constant[:, :, None, None], x, slope[:, :, None, None])
        to_x = to_x.addcmul_(g, scale[:, :, None, None]).to(x.dtype)
        return to_x, to_gamma.sum_to_size(gamma.shape), total.sum_to_size(beta.shape), to_alpha, None


class NoNorm(nn.Module):
    """The identity in a norm's place."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return x


class InstanceNormPlus(nn.Module):
    """`instance_norm` with learned gamma, alpha ~ N(1, 0.02^2) and beta = 0 at first.

    Args:
        channels: C, at least 2 (the variance over one channel is undefined).

    Raises:
        ValueError: If channels < 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        _check_norm(channels)
        self.alpha = nn.Parameter(torch.empty(channels).normal_(1, 0.02))
        self.gamma = nn.Parameter(torch.empty(channels).normal_(1, 0.02))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return instance_norm(x, self.gamma, self.beta, self.alpha)


class ConditionalInstanceNorm(nn.Module):
    """`instance_norm` with its own coefficients for each noise level, rows (gamma | alpha | beta) of an embedding.

    Args:
        channels: C, at least 2.
        levels: L.
        plus: False leaves alpha out: rows (gamma | beta) and gamma ~ U(0, 1) at first, as in the official code.

    Raises:
        ValueError: If channels < 2.
    """

    def __init__(self, channels: int, levels: int, *, plus: bool = True) -> None:
        super().__init__()
        _check_norm(channels)
        self.plus = plus
        self.embed = nn.Embedding(levels, (3 if plus else 2) * channels)
        with torch.no_grad():
            *scales, beta = self.embed.weight.split(channels, dim=1)
            beta.zero_()
            for scale in scales:
                scale.normal_(1, 0.02) if plus else scale.uniform_()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gamma, *alpha, beta = self.embed(y).chunk(3 if self.plus else 2, dim=1)
        return instance_norm(x, gamma, beta, *alpha)


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
        norm: Makes the norms.
        down: Halve the resolution. With a dilation it stays: the dilation takes the place of the pooling, and the
            shortcut is a dilated 3x3 convolution (so in the official code).
        dilation: Of every 3x3 convolution of the block.

    Raises:
        ValueError: If the channels change without `down`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        act: str,
        *,
        norm: Norm = InstanceNormPlus,
        down: bool = False,
        dilation: int | None = None,
    ) -> None:
        super().__init__()
        if in_channels != out_channels and not down:
            raise ValueError(f"expected equal channels in a block without down, got {in_channels} -> {out_channels}")
        pool = down and dilation is None
        d = dilation or 1
        self.act = ACTIVATIONS[act]
        self.conv1 = conv3x3(in_channels, in_channels, dilation=d)
        self.normalize2 = norm(in_channels)
        self.conv2: nn.Module
        self.shortcut: nn.Module
        if pool:
            self.conv2 = ConvMeanPool(in_channels, out_channels, 3)
            self.shortcut = ConvMeanPool(in_channels, out_channels, 1)
        else:
            self.conv2 = conv3x3(in_channels, out_channels, dilation=d)
            self.shortcut = conv3x3(in_channels, out_channels, dilation=d) if down else nn.Identity()
        self.normalize1 = norm(in_channels)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.conv1(self.act(self.normalize1(x, y)))
        h = self.conv2(self.act(self.normalize2(h, y)))
        return h + self.shortcut(x)


class ResidualConvUnit(nn.Module):
    """RCU: `blocks` times x <- x + (norm -> act -> conv -> norm -> act -> conv)(x), convolutions without bias.

    Shapes (B, features, H, W), in and out.
    """

    def __init__(self, features: int, blocks: int, act: str, norm: Norm = NoNorm) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.blocks = blocks
        for name in (f"{b}_{s}" for b in range(1, blocks + 1) for s in (1, 2)):  # the keys of official checkpoints
            self.add_module(f"{name}_norm", norm(features))
            self.add_module(f"{name}_conv", conv3x3(features, features, bias=False))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        for b in range(1, self.blocks + 1):
            h = x
            for s in (1, 2):
                norm, conv = getattr(self, f"{b}_{s}_norm"), getattr(self, f"{b}_{s}_conv")
                h = conv(self.act(norm(h, y)))
            x = x + h
        return x


POOLS: dict[str, Callable[[Tensor], Tensor]] = {  # 5x5, the size stays
    "max": lambda x: F.max_pool2d(x, 5, stride=1, padding=2),
    "avg": lambda x: F.avg_pool2d(x, 5, stride=1, padding=2),
}


class ChainedResidualPooling(nn.Module):
    """CRP: x <- act(x), then twice p <- conv(pool(norm(p))) with x <- x + p, starting from p = x; no bias.

    Shapes (B, features, H, W), in and out.
    """

    def __init__(self, features: int, act: str, *, pool: str = "max", norm: Norm = NoNorm, stages: int = 2) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.pool = pool
        self.convs = nn.ModuleList(conv3x3(features, features, bias=False) for _ in range(stages))
        self.norms = nn.ModuleList(norm(features) for _ in range(stages))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = path = self.act(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            path = conv(POOLS[self.pool](norm(path, y)))
            x = x + path
        return x


class MultiResolutionFusion(nn.Module):
    """MSF: the sum of conv(norm(x_i)), each brought to the output's size, bilinear with the corners aligned.

    Inputs (B, in_channels[i], H_i, W_i); output (B, features, *size).
    """

    def __init__(self, in_channels: tuple[int, ...], features: int, norm: Norm = NoNorm) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv3x3(c, features) for c in in_channels)
        self.norms = nn.ModuleList(norm(c) for c in in_channels)

    def forward(self, xs: tuple[Tensor, ...], size: torch.Size, y: Tensor | None = None) -> Tensor:
        fused = [conv(norm(x, y)) for norm, conv, x in zip(self.norms, self.convs, xs, strict=True)]
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
        pool: Of the CRP, "max" or "avg".
        norm: Makes the norms.
        last: The last block ends with an RCU of 3 blocks instead of 1.
    """

    def __init__(
        self,
        in_channels: tuple[int, ...],
        features: int,
        act: str,
        *,
        pool: str = "max",
        norm: Norm = NoNorm,
        last: bool = False,
    ) -> None:
        super().__init__()
        self.adapt_convs = nn.ModuleList(ResidualConvUnit(c, 2, act, norm) for c in in_channels)
        self.output_convs = ResidualConvUnit(features, 3 if last else 1, act, norm)
        if len(in_channels) > 1:
            self.msf = MultiResolutionFusion(in_channels, features, norm)
        self.crp = ChainedResidualPooling(features, act, pool=pool, norm=norm)

    def forward(self, xs: tuple[Tensor, ...], y: Tensor | None = None) -> Tensor:
        """Inputs (B, in_channels[i], H_i, W_i), the first of the output's size; output (B, features, H_0, W_0)."""
        adapted = tuple(adapt(x, y) for adapt, x in zip(self.adapt_convs, xs, strict=True))
        h = self.msf(adapted, xs[0].shape[2:], y) if len(adapted) > 1 else adapted[0]
        return self.output_convs(self.crp(h, y), y)


class Stage(NamedTuple):
    """Two ResBlocks of the encoder and the RefineBlock that joins their output; names as in official checkpoints."""

    res: str
    refine: str
    widen: int  # channels, in multiples of the width
    down: bool = True
    dilation: int | None = None  # in place of the halved resolution


PLAIN = (
    Stage("res1", "refine4", 1, down=False),
    Stage("res2", "refine3", 2),
    Stage("res3", "refine2", 2, dilation=2),
    Stage("res4", "refine1", 2, dilation=4),
)
DEEPER = (
    Stage("res1", "refine5", 1, down=False),
    Stage("res2", "refine4", 2),
    Stage("res3", "refine3", 2),
    Stage("res4", "refine2", 4, dilation=2),
    Stage("res5", "refine1", 4, dilation=4),
)
DEEPEST = (*DEEPER[:3], Stage("res31", "refine31", 2), *DEEPER[3:])


class RefineNetwork(ScoreNetwork):
    """The trunk: an encoder of `stages`, and a decoder that walks them back and widens to the next one's channels.

    The keys of the state dict are those of the official checkpoints.

    Args:
        channels: As the other four, see `ScoreNetwork`.
        width: At least 2, since InstanceNorm++ needs two channels.
        act: Activation.
        rescale: Of the pixels.
        norm: Makes the norms of the ResBlocks and the last one.
        refine_norm: Makes the norms of the RefineBlocks.
        pool: Of the RefineBlocks, "max" or "avg".
    """

    stages: ClassVar[tuple[Stage, ...]] = PLAIN
    multiple = 2

    def __init__(
        self, *, channels: int, width: int, act: str, rescale: bool, norm: Norm, refine_norm: Norm, pool: str
    ) -> None:
        super().__init__(channels=channels, width=width, act=act, rescale=rescale)
        self.begin_conv = conv3x3(channels, width)
        self.normalizer = norm(width)
        self.end_conv = conv3x3(width, channels)
        widths = [stage.widen * width for stage in self.stages]
        for stage, c_in, c in zip(self.stages, [width, *widths], widths, strict=False):
            first = ResBlock(c_in, c, act, norm=norm, down=stage.down, dilation=stage.dilation)
            second = ResBlock(c, c, act, norm=norm, dilation=stage.dilation)
            self.add_module(stage.res, nn.ModuleList((first, second)))
        blocks = {}
        inputs: tuple[int, ...] = ()
        for k in reversed(range(len(widths))):
            features = widths[max(k - 1, 0)]
            inputs = (widths[k], *inputs)
            blocks[self.stages[k].refine] = RefineBlock(inputs, features, act, pool=pool, norm=refine_norm, last=k == 0)
            inputs = (features,)
        for name in sorted(blocks):  # the official order, by which optimizer states are numbered
            self.add_module(name, blocks[name])

    def trunk(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        """f(h, y): (B, C, H, W) -> (B, C, H, W)."""
        h = self.begin_conv(h)
        layers = []
        for stage in self.stages:
            for block in getattr(self, stage.res):
                h = block(h, y)
            layers.append(h)
        path: tuple[Tensor, ...] = ()
        for stage, layer in zip(reversed(self.stages), reversed(layers), strict=True):
            path = (getattr(self, stage.refine)((layer, *path), y),)
        return self.end_conv(self.act(self.normalizer(path[0], y)))


class RefineNet(RefineNetwork):
    """The baseline of one noise level (arXiv:1907.05600, section 5): InstanceNorm++ everywhere; sigma is ignored.

    Args:
        channels: As the others, see `ScoreNetwork`.
        width: Channels of the first stage.
        act: Activation.
        rescale: Of the pixels.
    """

    def __init__(self, *, channels: int, width: int, act: str = "elu", rescale: bool = True) -> None:
        super().__init__(
            channels=channels,
            width=width,
            act=act,
            rescale=rescale,
            norm=InstanceNormPlus,
            refine_norm=InstanceNormPlus,
            pool="avg",
        )

    def _score(self, h: Tensor, sigma: Tensor) -> Tensor:
        return self.trunk(h)


def _check_norm(channels: int) -> None:
    if channels < 2:
        raise ValueError(f"expected channels >= 2 for InstanceNorm++, got {channels}")
