"""Denoising and sliced score matching: identities, closed forms, the official code's values."""

import math

import pytest
import torch
from torch import nn

from ncsn.losses import annealed_sliced_score_matching, denoising_score_matching, sliced_score_matching
from tests.ncsn import golden


def test_zero_score_has_the_expectation_half_the_dimension():
    n, shape = 20_000, (1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    x, z = torch.rand(n, *shape, generator=generator), torch.randn(n, *shape, generator=generator)
    loss = denoising_score_matching(lambda x, sigma: torch.zeros_like(x), x, torch.full((n,), 0.3), z)
    assert loss.shape == (n,)
    assert abs(loss.mean() - 32) < 5 * math.sqrt(32 / n)  # half a chi-squared variable of 64 degrees


def test_exact_score_of_gaussian_data_has_its_closed_form():
    """E = D s^2 / (2 (s^2 + sigma^2)) for data N(0, s^2) and the score -x / (s^2 + sigma^2)."""
    n, dim, s, sigma = 50_000, 16, 0.7, 0.4
    generator = torch.Generator().manual_seed(0)
    x, z = s * torch.randn(n, dim, generator=generator), torch.randn(n, dim, generator=generator)
    loss = denoising_score_matching(lambda x, _: -x / (s**2 + sigma**2), x, torch.full((n,), sigma), z)
    expected = dim * s**2 / (2 * (s**2 + sigma**2))
    assert abs(loss.mean() - expected) < 5 * loss.std() / math.sqrt(n)


@pytest.mark.parametrize("n", [1, 3])
def test_sliced_values_of_the_official_code(n):
    data, score = golden.toy()
    x, sigma = data["x"], torch.ones(32)
    ssm, vr = data[f"ssm_n{n}"], data[f"ssm_vr_n{n}"]
    v = nn.functional.normalize(ssm["v_raw"].view(n, 32, 2), dim=-1)
    loss = sliced_score_matching(score, x, sigma, v, variance_reduced=False)
    assert loss.shape == (32,)
    assert loss.mean().item() == pytest.approx(ssm["loss"], rel=1e-5)
    loss = sliced_score_matching(score, x, sigma, vr["v"].view(n, 32, 2))
    assert loss.mean().item() == pytest.approx(vr["loss"], rel=1e-5)


@pytest.mark.parametrize("variance_reduced", [False, True])
def test_sliced_is_the_objective_with_the_whole_jacobian(variance_reduced):
    data, mlp = golden.toy()
    mlp.double()
    x, sigma = data["x"].double(), torch.ones(32).double()
    v = data["ssm_vr_n3"]["v"].view(3, 32, 2).double()
    jacobian = torch.stack([torch.func.jacrev(lambda row: mlp(row[None], sigma[:1])[0])(row) for row in x])  # (B, 2, 2)
    s = mlp(x, sigma)
    square = s.square().sum(1) if variance_reduced else torch.einsum("nbi,bi->nb", v, s).square()
    expected = (0.5 * square + torch.einsum("nbi,bij,nbj->nb", v, jacobian, v)).mean(0)
    loss = sliced_score_matching(mlp, x, sigma, v, variance_reduced=variance_reduced)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(loss.mean(), list(mlp.parameters()), allow_unused=True, materialize_grads=True)
    want = torch.autograd.grad(expected.mean(), list(mlp.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_signs_are_exact_for_a_diagonal_jacobian():
    """The score -a x of Gaussian data has v . J v = -sum a for every v of +-1: score matching itself."""
    a = torch.tensor([0.5, 2.0, 3.0]).double()
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double()
    v = torch.randint(0, 2, (4, 20, 3), generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    loss = sliced_score_matching(lambda x, sigma: -a * x, x, torch.ones(20).double(), v)
    torch.testing.assert_close(loss, 0.5 * (a * x).square().sum(1) - a.sum(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("variance_reduced", [False, True])
def test_sliced_expectation_on_gaussian_data_is_that_of_score_matching(variance_reduced):
    """E = D (s^2 c^2 / 2 - c) for data N(0, s^2) and the score -c x, least at the true c = 1 / s^2."""
    n, dim, s, c = 100_000, 4, 0.8, 1.1
    generator = torch.Generator().manual_seed(0)
    x, v = s * torch.randn(n, dim, generator=generator), torch.randn(n, dim, generator=generator)
    loss = sliced_score_matching(lambda x, _: -c * x, x, torch.ones(n), v, variance_reduced=variance_reduced)
    assert abs(loss.mean() - dim * (s**2 * c**2 / 2 - c)) < 5 * loss.std() / math.sqrt(n)


def test_annealed_sliced_and_denoising_losses_differ_by_a_constant():
    """E DSM = E sigma^2 SSM + D / 2, whatever the score (arXiv:1907.05600, section 4.2); here 3 sin(x) at one level."""
    n, dim, sigma = 200_000, 2, 0.5
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, dim, generator=generator)
    z, v = torch.randn(n, dim, generator=generator), torch.randn(n, dim, generator=generator)
    score, level = lambda x, _: 3 * x.sin(), torch.full((n,), sigma)
    difference = denoising_score_matching(score, x, level, z) - annealed_sliced_score_matching(score, x, level, z, v)
    assert abs(difference.mean() - dim / 2) < 5 * difference.std() / math.sqrt(n)


def test_sliced_needs_one_forward_and_works_without_gradients():
    data, score = golden.toy()
    calls = []
    counted = lambda x, sigma: (calls.append(1), score(x, sigma))[1]  # noqa: E731
    v = data["ssm_vr_n3"]["v"].view(3, 32, 2)
    with_graph = sliced_score_matching(counted, data["x"], torch.ones(32), v)
    assert len(calls) == 1
    assert with_graph.requires_grad
    with torch.no_grad():
        loss = sliced_score_matching(score, data["x"], torch.ones(32), v)
    assert not loss.requires_grad
    assert torch.equal(loss, with_graph)
    assert not data["x"].requires_grad


def test_directions_of_another_shape_are_named():
    with pytest.raises(ValueError, match=r"expected v of shape \(4, 2\) or \('n', 4, 2\), n >= 1, got \(8, 2\)"):
        sliced_score_matching(lambda x, _: -x, torch.zeros(4, 2), torch.ones(4), torch.zeros(8, 2))
