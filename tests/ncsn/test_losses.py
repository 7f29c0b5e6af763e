"""Denoising score matching: identities, closed forms, the official code's values."""

import math
from pathlib import Path

import pytest
import torch

from ncsn.losses import denoising_score_matching
from ncsn.networks import NCSNv2

GOLDEN = Path(__file__).parent.parent / "golden"


def test_values_and_gradients_of_the_official_code():
    golden = torch.load(GOLDEN / "ncsnv2_16.pt", weights_only=True)
    network = NCSNv2(channels=3, width=8)
    network.load_state_dict({key: value for key, value in golden["state_dict"].items() if key != "sigmas"})
    dsm = golden["dsm"]
    loss = denoising_score_matching(network, dsm["x"], golden["sigmas"][dsm["labels"]], dsm["z"])
    torch.testing.assert_close(loss, dsm["per_sample"].float(), rtol=1e-4, atol=0)
    assert loss.mean().item() == pytest.approx(float(dsm["loss"]), rel=1e-4)
    loss.mean().backward()
    for name, parameter in network.named_parameters():
        if name in dsm["grad_norms"]:
            norm = float(dsm["grad_norms"][name])
            assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-3), name


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
