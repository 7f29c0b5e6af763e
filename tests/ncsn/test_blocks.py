"""The blocks of the RefineNet against those of the official code, one by one; norms against their definition.

Left out of the golden data, since no network of the papers has them: VarianceNorm, the conditional norm without bias,
the padded ConvMeanPool, the ResBlock that widens without `down`.
"""

from functools import partial
from pathlib import Path

import pytest
import torch

from ncsn.networks.refinenet import (
    ChainedResidualPooling,
    ConditionalInstanceNorm,
    ConvMeanPool,
    InstanceNormPlus,
    MultiResolutionFusion,
    RefineBlock,
    ResBlock,
    ResidualConvUnit,
    instance_norm,
)

GOLDEN = Path(__file__).parent.parent / "golden"
CONDITIONAL = partial(ConditionalInstanceNorm, levels=4)

BLOCKS = {
    "modules_ncsn.pt": {
        "CondInstanceNorm++": CONDITIONAL(6),
        "CondCRPBlock": ChainedResidualPooling(6, "elu", pool="avg", norm=CONDITIONAL),
        "CondRCUBlock_2x2": ResidualConvUnit(6, 2, "elu", CONDITIONAL),
        "ConvMeanPool_k3": ConvMeanPool(6, 12, 3),
        "ConvMeanPool_k1": ConvMeanPool(6, 12, 1),
        "CondResBlock_plain": ResBlock(6, 6, "elu", norm=CONDITIONAL),
        "CondResBlock_down": ResBlock(6, 12, "elu", norm=CONDITIONAL, down=True),
        "CondResBlock_down_dil2": ResBlock(6, 6, "elu", norm=CONDITIONAL, down=True, dilation=2),
        "CondResBlock_dil4": ResBlock(6, 6, "elu", norm=CONDITIONAL, dilation=4),
        "CondMSFBlock": MultiResolutionFusion((6, 12), 6, CONDITIONAL),
        "CondRefineBlock_start": RefineBlock((6,), 6, "elu", pool="avg", norm=CONDITIONAL),
        "CondRefineBlock_mid": RefineBlock((6, 6), 12, "elu", pool="avg", norm=CONDITIONAL),
        "CondRefineBlock_end": RefineBlock((6, 6), 6, "elu", pool="avg", norm=CONDITIONAL, last=True),
    },
    "modules_ncsnv2.pt": {
        "InstanceNorm++": InstanceNormPlus(6),
        "CRPBlock_max": ChainedResidualPooling(6, "elu", pool="max"),
        "CRPBlock_avg": ChainedResidualPooling(6, "elu", pool="avg"),
        "RCUBlock_2x2": ResidualConvUnit(6, 2, "elu"),
        "RCUBlock_3x2": ResidualConvUnit(6, 3, "elu"),
        "MSFBlock": MultiResolutionFusion((6, 12), 6),
        "MSFBlock_odd": MultiResolutionFusion((6, 6), 6),
        "ResBlock_plain": ResBlock(6, 6, "elu"),
        "ResBlock_down": ResBlock(6, 12, "elu", down=True),
        "ResBlock_down_dil2": ResBlock(6, 12, "elu", down=True, dilation=2),
        "ResBlock_dil4": ResBlock(6, 6, "elu", dilation=4),
        "RefineBlock_start": RefineBlock((6,), 6, "elu"),
        "RefineBlock_mid": RefineBlock((6, 6), 12, "elu"),
        "RefineBlock_end": RefineBlock((6, 6), 6, "elu", last=True),
    },
}


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, blocks in BLOCKS.items() for name in blocks])
def test_block_of_the_official_code(file, name):
    golden = torch.load(GOLDEN / file, weights_only=True)[name]
    block = BLOCKS[file][name]
    assert list(block.state_dict()) == list(golden["state_dict"])
    block.load_state_dict(golden["state_dict"])
    xs, y = [], None
    for value in golden["inputs"]:
        if isinstance(value, list):
            xs += value
        elif isinstance(value, torch.Tensor) and value.ndim == 4:
            xs.append(value)
        elif isinstance(value, torch.Tensor):
            y = value
    if isinstance(block, RefineBlock):
        out = block(tuple(xs), y)
    elif isinstance(block, MultiResolutionFusion):
        out = block(tuple(xs), xs[0].shape[2:], y)
    else:
        out = block(*xs) if isinstance(block, ConvMeanPool) else block(*xs, y)
    assert out.shape == golden["output"].shape
    assert (out - golden["output"]).abs().max() < 2e-6 * golden["output"].abs().max()


def test_norm_is_its_definition_in_float64():
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(2, 5, 4, 6, dtype=torch.float64, generator=generator)
    gamma, beta, alpha = torch.randn(3, 2, 5, 1, 1, dtype=torch.float64, generator=generator)
    mu, var = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
    t = (mu - mu.mean(1, keepdim=True)) / (mu.var(1, keepdim=True) + 1e-5).sqrt()
    plain = (x - mu) / (var + 1e-5).sqrt()
    expected = gamma * (plain + alpha * t) + beta
    gamma, beta, alpha = gamma[..., 0, 0], beta[..., 0, 0], alpha[..., 0, 0]
    torch.testing.assert_close(instance_norm(x, gamma, beta, alpha), expected, rtol=1e-12, atol=1e-12)
    expected = torch.nn.functional.instance_norm(x) * gamma[:, :, None, None] + beta[:, :, None, None]
    torch.testing.assert_close(instance_norm(x, gamma, beta), expected, rtol=1e-12, atol=1e-12)


def test_norm_keeps_the_statistics_of_bfloat16_images_in_float32():
    x = (100 + torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))).bfloat16()
    ones = torch.ones(4)
    out = instance_norm(x, ones, torch.zeros(4))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), instance_norm(x.float(), ones, torch.zeros(4)), rtol=2**-8, atol=0)


def _coefficients(rows, channels, generator):
    """gamma, beta and alpha, one row for all images or one for each."""
    shape = (3, channels) if rows is None else (3, rows, channels)
    return list(torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_().unbind())


@pytest.mark.parametrize("contrast", [True, False])
@pytest.mark.parametrize("rows", [None, 2], ids=["shared", "conditional"])
def test_gradients_of_the_norm_by_finite_differences(contrast, rows):
    generator = torch.Generator().manual_seed(0)
    x = (3 + 2 * torch.randn(2, 3, 2, 3, dtype=torch.float64, generator=generator)).requires_grad_()
    gamma, beta, alpha = _coefficients(rows, 3, generator)
    inputs = (x, gamma, beta, alpha) if contrast else (x, gamma, beta)
    assert torch.autograd.gradcheck(instance_norm, inputs)
    assert torch.autograd.gradgradcheck(instance_norm, inputs)
    frozen = x.detach(), *inputs[1:]
    assert torch.autograd.gradcheck(instance_norm, frozen)
    assert torch.autograd.gradgradcheck(instance_norm, frozen)


@pytest.mark.parametrize("mean", [0, 1000])
def test_gradient_of_the_norm_is_exact_in_float32_when_the_mean_is_large(mean):
    generator = torch.Generator().manual_seed(0)
    x = mean + torch.randn(2, 4, 16, 16, dtype=torch.float32, generator=generator)
    g = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    coefficients = [each.detach() for each in _coefficients(None, 4, generator)]

    def gradients(dtype):
        inputs = [each.to(dtype).requires_grad_() for each in (x, *coefficients)]
        return torch.autograd.grad(instance_norm(*inputs), inputs, g.to(dtype))

    tolerance = 1e-6 * max(1, mean)  # mu itself is known to a few ulps, 6e-8 mean
    for found, expected in zip(gradients(torch.float32), gradients(torch.float64), strict=True):
        assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_gradient_of_the_norm_of_bfloat16_images_is_summed_in_float32():
    generator = torch.Generator().manual_seed(0)
    x = (10 + torch.randn(2, 4, 32, 32, generator=generator)).bfloat16()
    g = torch.randn(x.shape, generator=generator).bfloat16()
    coefficients = [each.detach().float() for each in _coefficients(None, 4, generator)]

    def gradients(x, g):
        inputs = [each.clone().requires_grad_() for each in (x, *coefficients)]
        return torch.autograd.grad(instance_norm(*inputs), inputs, g)

    (to_x, *found), (expected_x, *expected) = gradients(x, g), gradients(x.float(), g.float())
    assert to_x.dtype == torch.bfloat16
    torch.testing.assert_close(to_x.float(), expected_x, rtol=2**-8, atol=1e-6)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


def test_norm_and_gradient_are_the_same_under_function_transforms_and_compilation():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=generator).requires_grad_()
    coefficients = _coefficients(None, 4, generator)
    g = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    out = instance_norm(x, *coefficients)
    expected = torch.autograd.grad(out, (x, *coefficients), g)
    transformed, pull = torch.func.vjp(instance_norm, x, *coefficients)
    compiled = torch.compile(instance_norm, backend="aot_eager", fullgraph=True)(x, *coefficients)
    for other in (transformed, compiled):
        torch.testing.assert_close(other, out, rtol=1e-12, atol=1e-12)
    for found in (pull(g), torch.autograd.grad(compiled, (x, *coefficients), g)):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    tangent = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    _, pushed = torch.func.jvp(lambda x: instance_norm(x, *coefficients), (x,), (tangent,))
    torch.testing.assert_close((pushed * g).sum(), (expected[0] * tangent).sum(), rtol=1e-12, atol=1e-12)


def test_norm_keeps_one_image_and_few_statistics_for_its_gradient():
    x = torch.randn(2, 8, 32, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        instance_norm(x, *(torch.ones(8, requires_grad=True) for _ in range(3)))
    assert sum(tensor.numel() for tensor in kept) < 1.05 * x.numel()


def test_conditional_norms_start_as_published():
    plus = ConditionalInstanceNorm(1000, 20).embed.weight
    for scale in (plus[:, :1000], plus[:, 1000:2000]):
        assert abs(scale.mean() - 1) < 5 * 0.02 / 20_000**0.5
        assert abs(scale.std() - 0.02) < 5 * 0.02 / 40_000**0.5
    plain = ConditionalInstanceNorm(1000, 20, plus=False).embed.weight
    assert plain.shape == (20, 2000)
    assert 0 <= plain.min() < 0.001
    assert abs(plain[:, :1000].mean() - 0.5) < 5 / (12 * 20_000) ** 0.5
    assert plus[:, 2000:].eq(0).all()
    assert plain[:, 1000:].eq(0).all()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"channels >= 2 for InstanceNorm\+\+, got 1"):
        InstanceNormPlus(1)
    with pytest.raises(ValueError, match=r"channels >= 2 for InstanceNorm\+\+, got 1"):
        ConditionalInstanceNorm(1, 3)
    with pytest.raises(ValueError, match="equal channels in a block without down, got 4 -> 8"):
        ResBlock(4, 8, "elu")
