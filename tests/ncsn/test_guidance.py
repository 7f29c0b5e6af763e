"""Guidance by a classifier: Bayes' rule, with the exact scores of a mixture."""

import math

import pytest
import torch

from ncsn import guidance, noise, samplers
from ncsn.toy import Mixture

WEIGHTS, MEANS = torch.tensor([0.8, 0.2]).double(), torch.tensor([[1.0, 1.0], [-1.0, -0.5]]).double()
MIXTURE, SECOND = Mixture(WEIGHTS, MEANS, 0.3), Mixture(torch.ones(1).double(), MEANS[1:], 0.3)


def of_the_second(x, sigma):
    """log p_sigma(second component | x)."""
    return math.log(0.2) + SECOND.log_prob(x, sigma) - MIXTURE.log_prob(x, sigma)


def test_the_guided_score_is_that_of_the_class():
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.linspace(0.1, 5, 50, dtype=torch.float64)
    found = guidance.guided(MIXTURE.score, of_the_second)(x, sigma)
    assert torch.allclose(found, SECOND.score(x, sigma))
    assert torch.allclose(guidance.guided(MIXTURE.score, of_the_second, scale=0)(x, sigma), MIXTURE.score(x, sigma))
    assert not found.requires_grad


def test_samples_are_of_the_class():
    """One in five without guidance, all with it; mean and deviation within four standard errors of the component's."""
    n = 2000
    rng = torch.Generator().manual_seed(1)
    x = 10 * torch.randn(n, 2, dtype=torch.float64, generator=rng)
    sigmas = noise.edm_sigmas(10.0, 0.01, 41)
    plain = samplers.probability_flow(MIXTURE.score, x, sigmas)
    assert 0.1 < float(((plain - MEANS[1]).norm(dim=1) < 1.2).double().mean()) < 0.3
    drawn = samplers.probability_flow(guidance.guided(MIXTURE.score, of_the_second), x, sigmas)
    assert ((drawn.mean(0) - MEANS[1]).abs() < 4 * 0.3 / math.sqrt(n) + 0.005).all()
    assert (drawn.std(0) - 0.3).abs().max() < 4 * 0.3 / math.sqrt(2 * n) + 0.005


def test_a_classifier_of_images_guides_through_what_x_is_expected_to_be():
    """Nearly all samples are what it takes for the second component; its gradient is that of the whole expression."""

    def clean(x):
        return of_the_second(x, torch.zeros(len(x), dtype=torch.float64))

    log_prob = guidance.of_denoised(MIXTURE.score, clean)
    x, sigma = torch.tensor([[0.3, 0.1]]).double(), torch.tensor([0.7]).double()
    mean = x + 0.49 * MIXTURE.score(x, sigma)
    assert torch.allclose(log_prob(x, sigma), clean(mean))
    guided, h = guidance.guided(MIXTURE.score, log_prob), 1e-5
    shifts = h * torch.eye(2).double()
    slope = torch.stack([(log_prob(x + d, sigma) - log_prob(x - d, sigma))[0] / (2 * h) for d in shifts])
    assert torch.allclose(guided(x, sigma) - MIXTURE.score(x, sigma), slope[None], atol=1e-6)
    start = 10 * torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    drawn = samplers.probability_flow(guided, start, noise.edm_sigmas(10.0, 0.01, 101))
    assert float((clean(drawn).exp() > 0.5).double().mean()) > 0.95


def test_with_a_spread_the_derivative_is_that_of_gaussian_data():
    """For them it is the one through the score, which then need not be differentiable."""
    spread = 0.6

    def gaussian(x, sigma):
        return -x / (spread**2 + sigma[:, None] ** 2)

    def clean(x):
        return x.sin().sum(1)

    x, sigma = torch.tensor([[0.3, 0.1], [2.0, -1.0]]).double(), torch.tensor([0.7, 0.01]).double()
    through, without = (
        guidance.guided(gaussian, guidance.of_denoised(score, clean, spread=each))(x, sigma)
        for score, each in ((gaussian, None), (lambda x, sigma: gaussian(x, sigma).detach(), spread))
    )
    assert torch.allclose(through, without)
    assert not torch.allclose(through, gaussian(x, sigma))


def test_a_negative_scale_is_refused():
    with pytest.raises(ValueError, match="expected a finite scale >= 0, got -1"):
        guidance.guided(MIXTURE.score, of_the_second, scale=-1)
