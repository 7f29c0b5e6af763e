"""Ladders, step rules, Techniques 1, 2 and 4: closed forms, the official ladders, the settings of arXiv:2006.09011."""

import math
from pathlib import Path

import pytest
import torch

from ncsn import noise

GOLDEN = Path(__file__).parent.parent / "golden"


def test_geometric_ladder_runs_from_the_largest_to_the_smallest_with_one_ratio():
    sigmas = noise.geometric_sigmas(50.0, 0.01, 232)
    assert sigmas.dtype == torch.float64
    assert sigmas[0] == pytest.approx(50.0, rel=1e-14)
    assert sigmas[-1] == pytest.approx(0.01, rel=1e-14)
    ratios = sigmas[:-1] / sigmas[1:]
    torch.testing.assert_close(ratios, torch.full_like(ratios, 5000 ** (1 / 231)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "sigma_1", "L"),
    [
        ("ncsn_original", 1, 10),
        ("cifar10", 50, 232),
        ("celeba", 90, 500),
        ("church", 140, 788),
        ("bedroom", 190, 1086),
        ("tower", 190, 1086),
        ("ffhq", 348, 2311),
        ("uniform_1_0.01_10", 1, 10),
    ],
)
def test_ladders_of_the_official_code_to_one_rounding(name, sigma_1, L):
    golden = torch.load(GOLDEN / "schedules.pt", weights_only=True)[name]
    ladder = noise.linear_sigmas if name.startswith("uniform") else noise.geometric_sigmas
    sigmas = ladder(sigma_1, 0.01, L).float()
    assert sigmas.shape == golden.shape
    assert ((sigmas - golden).abs() <= golden.nextafter(torch.tensor(math.inf)) - golden).all()


def test_a_given_ladder_is_kept():
    sigmas = noise.given_sigmas([3, 1.5, 0.1])
    assert sigmas.dtype == torch.float64
    assert sigmas.tolist() == [3, 1.5, 0.1]
    assert noise.given_sigmas([0.01]).tolist() == [0.01]
    assert torch.equal(noise.given_sigmas(sigmas), sigmas)


@pytest.mark.parametrize(
    "values", [[], [1, 1], [0.1, 1], [1, 0], [1, -1], [math.inf, 1], [1, math.nan], [math.nan, 1], [math.nan], [[1.0]]]
)
def test_values_that_are_no_ladder_are_refused(values):
    with pytest.raises(ValueError, match="finite sigmas that decrease strictly to a positive value, got"):
        noise.given_sigmas(values)


def test_linear_ladder_has_one_difference():
    sigmas = noise.linear_sigmas(1.0, 0.01, 10)
    torch.testing.assert_close(sigmas.diff(), torch.full((9,), -0.11, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 1.0, 10), "expected 0 < sigma_L < sigma_1, got sigma_L=1.0, sigma_1=0.5"),
        ((1.0, 0.0, 10), "got sigma_L=0.0"),
        ((math.inf, 0.01, 10), "got sigma_L=0.01, sigma_1=inf"),
        ((1.0, 0.01, 1), "expected L >= 2, got 1"),
    ],
)
@pytest.mark.parametrize("ladder", [noise.geometric_sigmas, noise.linear_sigmas])
def test_impossible_ladders_are_refused(ladder, arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ladder(*arguments)


def test_step_sizes_scale_with_the_square_of_sigma():
    sigmas = noise.geometric_sigmas(1.0, 0.01, 10)
    alpha = noise.langevin_step_sizes(sigmas, 2e-5)
    torch.testing.assert_close(alpha / sigmas**2, torch.full_like(alpha, 2e-5 / 0.01**2))
    assert alpha[-1] == pytest.approx(2e-5)
    with pytest.raises(ValueError, match="decrease strictly"):
        noise.langevin_step_sizes(sigmas.flip(0), 2e-5)
    with pytest.raises(ValueError, match="epsilon > 0, got 0"):
        noise.langevin_step_sizes(sigmas, 0)


def test_epsilon_rule_gives_the_step_sizes():
    sigmas = noise.geometric_sigmas(1.0, 0.01, 10)
    rule = noise.epsilon_rule(2e-5, 0.01)
    sizes = [rule(sigma, torch.zeros(2), torch.zeros(2)) for sigma in sigmas.tolist()]
    assert sizes == pytest.approx(noise.langevin_step_sizes(sigmas, 2e-5).tolist(), rel=1e-14)
    with pytest.raises(ValueError, match="epsilon > 0, got 0"):
        noise.epsilon_rule(0, 0.01)
    with pytest.raises(ValueError, match="0 < sigma_L < inf, got 0"):
        noise.epsilon_rule(2e-5, 0)


def test_snr_rule_holds_the_ratio_of_each_image():
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(5, 3, 4, 4, generator=generator) * torch.logspace(-3, 3, 5)[:, None, None, None]
    z = torch.randn(5, 3, 4, 4, generator=generator)
    alpha = noise.snr_rule(0.16)(0.5, s, z)
    assert alpha.shape == (5, 1, 1, 1)
    ratio = (alpha * s).flatten(1).norm(dim=1) / ((2 * alpha).sqrt() * z).flatten(1).norm(dim=1)
    torch.testing.assert_close(ratio, torch.full((5,), 0.16))
    parts = [noise.snr_rule(0.16)(0.5, s[k : k + 1], z[k : k + 1]) for k in range(5)]
    assert torch.equal(torch.cat(parts), alpha)


def test_snr_rule_answers_to_an_epsilon_on_noise():
    """s = -z / sigma: alpha = 2 (r sigma)^2, or epsilon (sigma / sigma_L)^2 for r = sqrt(epsilon / 2) / sigma_L."""
    z = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    epsilon, sigma_L, sigma = 6.2e-6, 0.01, 0.7
    rule = noise.snr_rule(math.sqrt(epsilon / 2) / sigma_L)
    expected = torch.full((4, 1), noise.epsilon_rule(epsilon, sigma_L)(sigma, z, z), dtype=torch.float64)
    torch.testing.assert_close(rule(sigma, -z / sigma, z), expected)
    torch.testing.assert_close(rule(sigma, torch.zeros_like(z), z), expected)
    with pytest.raises(ValueError, match="0 < r < inf, got 0"):
        noise.snr_rule(0)


def test_technique_1_is_the_largest_distance(monkeypatch):
    x = torch.rand(3000, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.cdist(x.flatten(1).double(), x.flatten(1).double()).max().item()
    assert noise.suggest_sigma_1(x) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(noise, "PAIRWISE_LIMIT", 2999)
    monkeypatch.setattr(noise, "PAIRWISE_SAMPLE", 500)
    assert 0.9 * expected < noise.suggest_sigma_1(x) <= expected * (1 + 1e-6)


def test_technique_1_needs_two_different_images():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        noise.suggest_sigma_1(torch.rand(1, 1, 4, 4))
    with pytest.raises(ValueError, match="images that differ"):
        noise.suggest_sigma_1(torch.ones(3, 1, 4, 4))


@pytest.mark.parametrize(
    ("sigma_1", "dim", "gamma", "levels", "rounded", "L", "C"),
    [
        (1, 3072, 1.039796, 119.0, 119, 10, 0.0),
        (50, 3072, 1.039796, 219.3, 219, 232, 0.5670),
        (90, 12288, 1.019510, 472.2, 472, 500, 0.5669),
        (140, 27648, 1.012923, 744.5, 745, 788, 0.5662),
        (190, 49152, 1.009661, 1025.7, 1026, 1086, 0.5665),
        (348, 196608, 1.004807, 2181.6, 2182, 2311, 0.5669),
    ],
)
def test_technique_2_for_the_published_data_sets(sigma_1, dim, gamma, levels, rounded, L, C):
    """The number of levels at an overlap of one half, and the overlap C of the L levels that were published."""
    assert noise.suggest_gamma(dim) == pytest.approx(gamma, abs=1e-6)
    assert noise.overlap(noise.suggest_gamma(dim), dim) == pytest.approx(0.5, abs=1e-9)
    exact = 1 + math.log(sigma_1 / 0.01) / math.log(noise.suggest_gamma(dim))
    assert exact == pytest.approx(levels, abs=0.0501)
    assert noise.suggest_levels(sigma_1, 0.01, dim) == rounded
    sigmas = noise.geometric_sigmas(sigma_1, 0.01, L)
    assert noise.overlap(float(sigmas[0] / sigmas[1]), dim) == pytest.approx(C, abs=5e-5)


def test_overlap_is_a_normal_mass():
    """C is the chance that a normal variable of mean sqrt(2 D) (gamma - 1) lies within 3 gamma of zero, by sampling."""
    dim, gamma, n = 784, 1.06, 400_000
    z = math.sqrt(2 * dim) * (gamma - 1) + torch.randn(n, generator=torch.Generator().manual_seed(0))
    share = (z.abs() < 3 * gamma).double().mean().item()
    assert abs(noise.overlap(gamma, dim) - share) < 5 * math.sqrt(share * (1 - share) / n)


@pytest.mark.parametrize(
    ("sigma_1", "L", "T", "epsilon", "ratio"),
    [
        (1, 10, 100, 3.23e-6, 1.0189),
        (50, 232, 5, 6.18e-6, 1.0555),
        (90, 500, 5, 3.34e-6, 1.0314),
        (140, 788, 4, 2.31e-6, 1.0224),
        (190, 1086, 3, 1.77e-6, 1.0174),
        (348, 2311, 3, 8.93e-7, 1.0089),
    ],
)
def test_technique_4_for_the_published_schedules(sigma_1, L, T, epsilon, ratio):
    sigmas = noise.geometric_sigmas(sigma_1, 0.01, L)
    found = noise.suggest_epsilon(sigmas, T)
    assert found == pytest.approx(epsilon, rel=2e-3)
    gamma = float(sigmas[0] / sigmas[1])
    u = torch.tensor(found / 0.01**2, dtype=torch.float64)
    assert noise.variance_ratio(u, gamma, T).item() == pytest.approx(ratio, abs=1e-4)


@pytest.mark.parametrize("sigmas", [[0.1, 1.0], [1.0, 0.0], [1.0, math.nan, 0.1], [1.0, 1.0]])
def test_technique_4_needs_a_ladder(sigmas):
    with pytest.raises(ValueError, match="finite sigmas that decrease strictly to a positive value, got"):
        noise.suggest_epsilon(torch.tensor(sigmas), 5)
    with pytest.raises(ValueError, match="at least 2 sigmas and 1 step a level, got 1 and 5"):
        noise.suggest_epsilon(torch.tensor([1.0]), 5)


def test_variance_ratio_is_the_recursion():
    """T steps of v <- (1 - u)^2 v + 2 u from v = gamma^2, in units of sigma_i^2."""
    gamma, u, T = 1.3, 0.2, 7
    v = gamma**2
    for _ in range(T):
        v = (1 - u) ** 2 * v + 2 * u
    assert noise.variance_ratio(torch.tensor(u, dtype=torch.float64), gamma, T).item() == pytest.approx(v, rel=1e-12)


@pytest.mark.parametrize(
    ("sigma_1", "L", "T", "epsilon", "ratio"),
    [
        (1, 10, 100, 2e-5, 1.1111),
        (50, 232, 5, 6.2e-6, 1.0555),
        (90, 500, 5, 3.3e-6, 1.0314),
        (140, 788, 4, 4.9e-6, 1.0247),
        (190, 1086, 3, 1.8e-6, 1.0174),
        (348, 2311, 3, 9e-7, 1.0089),
    ],
)
def test_variance_ratio_of_the_published_step_sizes(sigma_1, L, T, epsilon, ratio):
    sigmas = noise.geometric_sigmas(sigma_1, 0.01, L)
    u = torch.tensor(epsilon / 0.01**2, dtype=torch.float64)
    assert noise.variance_ratio(u, float(sigmas[0] / sigmas[1]), T).item() == pytest.approx(ratio, abs=5.1e-5)


def test_refined_ladders_have_steps_between():
    sigmas = noise.linear_sigmas(1, 0.1, 4)
    torch.testing.assert_close(noise.refined(sigmas, 1), sigmas)
    fine = noise.refined(sigmas, 5)
    assert len(fine) == 16
    torch.testing.assert_close(fine[::5], sigmas.double())
    ratios = (fine[1:] / fine[:-1]).view(3, 5)
    torch.testing.assert_close(ratios, ratios[:, :1].expand(-1, 5))
    geometric = noise.geometric_sigmas(50, 0.01, 24)
    torch.testing.assert_close(noise.refined(geometric, 10), noise.geometric_sigmas(50, 0.01, 231))
    with pytest.raises(ValueError, match="expected steps >= 1, got 0"):
        noise.refined(sigmas, 0)
