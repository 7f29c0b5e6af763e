"""The oracle: its score is the gradient of its log density, its density integrates to one."""

import math
from pathlib import Path

import pytest
import torch

from ncsn.toy import Mixture

GOLDEN = Path(__file__).parent.parent / "golden"


def _mixture():
    return Mixture(torch.tensor([0.8, 0.2]).double(), torch.tensor([[5.0, 5.0], [-5.0, -5.0]]).double(), 1.0)


def test_score_is_the_gradient_of_log_prob():
    x = (6 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()).requires_grad_()
    sigma = torch.linspace(0.1, 5, 50).double()
    (gradient,) = torch.autograd.grad(_mixture().log_prob(x, sigma).sum(), x)
    torch.testing.assert_close(_mixture().score(x, sigma), gradient)


def test_density_integrates_to_one():
    axis = torch.linspace(-20, 20, 401).double()
    x = torch.cartesian_prod(axis, axis)
    density = _mixture().log_prob(x, torch.ones(len(x)).double()).exp()
    assert abs(density.sum() * 0.1**2 - 1) < 1e-6


@pytest.mark.parametrize("sigma", [1, 2.5, 20])
def test_scores_and_densities_of_the_official_code(sigma):
    """Its components have the standard deviation sigma itself, and its density in two dimensions one factor too few."""
    golden = torch.load(GOLDEN / "toy_ssm.pt", weights_only=True)["gmm"]
    mixture = Mixture(torch.tensor([0.8, 0.2]), torch.tensor([[5.0, 5.0], [-5.0, -5.0]]), 0.0)
    x, level = golden["points"], torch.full((64,), float(sigma))
    score = golden[f"score_sigma{sigma}"]
    assert (mixture.score(x, level) - score).abs().max() < 1e-5 * score.abs().max()
    log_prob = mixture.log_prob(x, level) + 0.5 * math.log(2 * math.pi * sigma**2)
    torch.testing.assert_close(log_prob, golden[f"log_prob_sigma{sigma}"], rtol=1e-6, atol=1e-6)
    if sigma == 1:
        torch.testing.assert_close(log_prob, golden["log_prob_GMMDist"], rtol=1e-6, atol=1e-6)


def test_noise_adds_its_variance_to_the_components():
    weights, means = torch.tensor([0.3, 0.7]).double(), torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0]]).double()
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).double()
    level = lambda value: torch.full((9,), value).double()  # noqa: E731
    wide, narrow = Mixture(weights, means, 0.6), Mixture(weights, means, 0.0)
    torch.testing.assert_close(wide.log_prob(x, level(0.8)), narrow.log_prob(x, level(1.0)))
    torch.testing.assert_close(wide.score(x, level(0.8)), narrow.score(x, level(1.0)))


def test_samples_fall_to_the_components_by_their_weights():
    u = (torch.arange(1000).double() + 0.5) / 1000
    at_rest = _mixture().sample(u, torch.zeros(1000, 2).double())
    assert (at_rest == 5).all(1).sum() == 800
    assert (at_rest == -5).all(1).sum() == 200
    wide = Mixture(_mixture().weights, _mixture().means, 0.5)
    z = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(wide.sample(u, z), at_rest + 0.5 * z)
