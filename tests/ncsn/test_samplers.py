"""Annealed Langevin dynamics: the official code's trajectory, exact variances on Gaussian data, the paper's point."""

import math
from pathlib import Path

import pytest
import torch

from ncsn import noise, random, samplers
from ncsn.networks import NCSNv2
from ncsn.toy import Mixture

GOLDEN = Path(__file__).parent.parent / "golden"


def test_trajectory_of_the_official_code_step_by_step():
    golden = torch.load(GOLDEN / "ncsnv2_16.pt", weights_only=True)
    network = NCSNv2(channels=3, width=8)
    network.load_state_dict({key: value for key, value in golden["state_dict"].items() if key != "sigmas"})
    ald = golden["ald_v2"]
    steps = []
    final = samplers.annealed_langevin(
        network,
        ald["x_init"],
        golden["sigmas"],
        epsilon=ald["step_lr"],
        steps_per_level=ald["n_steps_each"],
        noise=lambda x, step: ald["noises"][step],
        observe=lambda x, step, sigma: steps.append(x.clone()),
    )
    assert len(steps) == 20
    scale = ald["images_after_each_step"].abs().amax()
    assert (torch.stack(steps) - ald["images_after_each_step"]).abs().max() < 1e-4 * scale
    assert (final - ald["final_denoise"]).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("denoise", [False, True])
def test_variance_on_gaussian_data_follows_the_exact_recursion(denoise):
    """For data N(0, s^2) every step is linear: v <- (1 - a / (s^2 + sigma^2))^2 v + 2 a."""
    s, n = 0.5, 200_000
    sigmas = noise.geometric_sigmas(3.0, 0.05, 8)
    epsilon, T = noise.suggest_epsilon(sigmas, 5), 5
    v = 1 / 12
    for sigma, alpha in zip(sigmas.tolist(), noise.langevin_step_sizes(sigmas, epsilon).tolist(), strict=True):
        for _ in range(T):
            v = (1 - alpha / (s**2 + sigma**2)) ** 2 * v + 2 * alpha
    if denoise:
        v *= (1 - sigmas[-1].item() ** 2 / (s**2 + sigmas[-1].item() ** 2)) ** 2
    index = torch.arange(n)
    x = samplers.annealed_langevin(
        lambda x, sigma: -x / (s**2 + sigma[:, None] ** 2),
        random.start_images(0, index, (1,)) - 0.5,
        sigmas,
        epsilon=epsilon,
        steps_per_level=T,
        denoise=denoise,
        noise=random.seeded_noise(0, index),
    )
    assert abs(x.mean()) < 5 * math.sqrt(v / n)
    assert abs(x.var() - v) < 5 * v * math.sqrt(2 / n)


def test_annealing_finds_the_weights_of_the_modes():
    """Figure 3 of arXiv:1907.05600: 0.8 of the mass in one mode; chains at the smallest level alone would keep half."""
    mixture = Mixture(torch.tensor([0.8, 0.2]), torch.tensor([[5.0, 5.0], [-5.0, -5.0]]), 0.0)
    n, index = 4000, torch.arange(4000)
    start = 16 * random.start_images(0, index, (2,)) - 8
    options = {"epsilon": 0.05, "steps_per_level": 100, "denoise": False, "noise": random.seeded_noise(0, index)}
    annealed = samplers.annealed_langevin(mixture.score, start, noise.geometric_sigmas(20.0, 1.0, 10), **options)
    plain = samplers.annealed_langevin(mixture.score, start, torch.tensor([1.0]), **options)
    in_mode = lambda x: (x.sum(1) > 0).double().mean().item()  # noqa: E731
    assert 0.75 < in_mode(annealed) < 0.85
    assert abs(in_mode(plain) - 0.5) < 5 * 0.5 / math.sqrt(n)


def test_a_sample_depends_on_its_number_alone():
    network = NCSNv2(channels=1, width=4).double()
    sigmas = noise.geometric_sigmas(2.0, 0.1, 3)

    def draw(index):
        return samplers.annealed_langevin(
            network,
            random.start_images(3, index, (1, 4, 4)).double(),
            sigmas,
            epsilon=1e-3,
            steps_per_level=2,
            noise=random.seeded_noise(3, index),
        )

    whole = draw(torch.arange(10))
    parts = torch.cat([draw(part) for part in torch.arange(10).split(3)])
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)


def test_bad_arguments_are_named():
    score, x = (lambda x, sigma: -x), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="steps_per_level >= 1, got 0"):
        samplers.annealed_langevin(score, x, torch.tensor([1.0, 0.1]), epsilon=1e-3, steps_per_level=0)
    with pytest.raises(ValueError, match="decrease strictly"):
        samplers.annealed_langevin(score, x, torch.tensor([0.1, 1.0]), epsilon=1e-3, steps_per_level=1)
    with pytest.raises(ValueError, match="epsilon > 0, got -1"):
        samplers.annealed_langevin(score, x, torch.tensor([1.0, 0.1]), epsilon=-1, steps_per_level=1)
