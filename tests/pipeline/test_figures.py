"""The papers' figures: what was measured for them, and that they are pictures."""

import functools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ncsn import noise
from pipeline import figures
from pipeline._stage import StageError
from pipeline._store import read_json

TINY = {
    "figure_1": functools.partial(figures.figure_1, steps=3, batch_size=2),
    "figure_2": functools.partial(figures.figure_2, steps=3, batch_size=4),
    "figure_3": functools.partial(figures.figure_3, n=10),
}
APART = 5 * math.sqrt(2)  # the modes lie at +-APART on the diagonal


def _numbers(value):
    if isinstance(value, dict):
        return [number for each in value.values() for number in _numbers(each)]
    return [value]


def test_the_stage_leaves_pictures_and_numbers(params, workdir, monkeypatch):
    for name, draw in TINY.items():
        monkeypatch.setattr(figures, name, draw)
    figures.main(params)
    assert {path.name for path in figures.OUT.iterdir()} == {
        *(f"{name}.png" for name in TINY),
        "figure_1.csv",
        "figures.json",
    }
    record = read_json(figures.OUT / "figures.json")
    for name in TINY:
        picture = Image.open(figures.OUT / f"{name}.png")
        assert min(picture.size) > 300
        assert len(picture.convert("L").getcolors()) > 20
        assert all(math.isfinite(number) for number in _numbers(record[name]["measured"]))
        assert record[name]["settings"]["seed"] == 0


def test_the_same_seed_gives_the_same_numbers(tmp_path):
    first, again = (TINY["figure_1"](tmp_path / "a.png") for _ in range(2))
    assert first == again
    assert TINY["figure_1"](tmp_path / "a.png", seed=1)["measured"] != first["measured"]


def _upper_share(levels, steps):
    """The share of Langevin chains that end in the upper mode, by the Chapman-Kolmogorov equation on a grid.

    The score along the diagonal does not depend on where a chain is across it, so its place u on the diagonal is a
    Markov chain: u' = u + epsilon s(u) + sqrt(2 epsilon) z. It starts as (x + y) / sqrt(2) of the uniform distribution
    on [-8, 8]^2, a triangle.
    """
    u = torch.linspace(-100, 100, 801, dtype=torch.float64)
    density = (8 * math.sqrt(2) - u.abs()).clamp(min=0)
    density /= density.sum()
    for std, epsilon in levels:
        upper = torch.sigmoid(2 * APART * u / std**2 + math.log(4))
        mean = u + epsilon * ((2 * upper - 1) * APART - u) / std**2
        kernel = torch.exp(-((u[:, None] - mean) ** 2) / (4 * epsilon))
        kernel /= kernel.sum(0)
        for _ in range(steps):
            density = kernel @ density
    return float(density[u > 0].sum() + density[u == 0].sum() / 2)


def test_the_shares_of_figure_3_are_those_that_theory_gives(tmp_path):
    result = figures.figure_3(tmp_path / "figure_3.png")
    sigmas = noise.geometric_sigmas(20, 1, 10).tolist()
    expected = {
        "exact": 0.8,
        "langevin": _upper_share([(1.0, 0.05)], 1000),
        "annealed": _upper_share([(sigma, 0.05 * sigma**2) for sigma in sigmas], 100),
    }
    assert expected["langevin"] == pytest.approx(0.5, abs=0.02)
    assert 0.75 < expected["annealed"] < 0.85
    for name, share in result["measured"]["share_in_upper_mode"].items():
        error = math.sqrt(expected[name] * (1 - expected[name]) / result["settings"]["n"])
        assert abs(share - expected[name]) < 4 * error, name


def test_a_learned_score_agrees_best_where_the_data_are(tmp_path):
    measured = figures.figure_2(tmp_path / "figure_2.png", steps=400)["measured"]
    dense, sparse = measured["dense"], measured["sparse"]
    assert dense["median_error"] < 0.5 * sparse["median_error"]
    assert dense["median_relative_error"] < sparse["median_relative_error"]
    assert dense["mean_cosine"] > sparse["mean_cosine"]


def test_sliced_score_matching_finds_the_score_of_a_normal_distribution():
    """Of N(0, I) it is -x; with b samples of x and v a coefficient has a standard error of about 1 / sqrt(b)."""
    network = _Linear()
    data = torch.Generator().manual_seed(0)
    losses = figures.fit(
        network,
        lambda index: torch.randn(len(index), 2, generator=data),
        steps=300,
        batch_size=1000,
        learning_rate=0.02,
        seed=0,
        what="a test",
    )
    assert (network.weight + torch.eye(2)).abs().max() < 4 / math.sqrt(1000)
    assert losses.shape == (300,)
    assert losses[-50:].mean() == pytest.approx(-1, abs=4 * 1 / math.sqrt(1000))  # -D / 2


class _Linear(nn.Linear):
    def __init__(self):
        super().__init__(2, 2, bias=False)
        nn.init.zeros_(self.weight)

    def forward(self, x, sigma):
        return super().forward(x)


def test_a_loss_that_is_not_finite_stops_the_stage():
    network = _Linear()
    network.weight.data.fill_(math.inf)
    with pytest.raises(StageError, match=r"a test: the loss is .* at step 1: lower the learning rate"):
        figures.fit(
            network,
            lambda index: torch.ones(len(index), 2),
            steps=2,
            batch_size=1,
            learning_rate=1,
            seed=0,
            what="a test",
        )


def test_tiles_are_the_photographs_cut_up():
    from sklearn.datasets import load_sample_images

    photograph = load_sample_images().images[1]
    tiles = figures.tiles(8)
    assert tiles.shape == (2 * 53 * 80, 3, 8, 8)
    tile = tiles[53 * 80 + 2 * 80 + 5].permute(1, 2, 0)  # of the second photograph, in row 2, column 5
    np.testing.assert_allclose(tile, photograph[16:24, 40:48] / 127.5 - 1, atol=1e-6)


def test_the_densest_region_is_the_smallest_that_holds_the_mass():
    density = figures.MIXTURE.log_prob(figures.square(41), torch.zeros(41**2)).exp()
    dense = figures.densest(density, 0.99)
    total = density.sum()
    assert density[dense].sum() >= 0.99 * total
    assert density[dense].sum() - density[dense].min() < 0.99 * total
    assert density[dense].min() >= density[~dense].max()


def test_steadiness_tells_a_steady_curve_from_a_restless_one():
    steady = figures.steadiness(-np.linspace(0, 10, 100))
    assert steady["setback"] == 0
    assert steady["median"] == pytest.approx(-8.79, abs=0.01)
    restless = figures.steadiness(np.concatenate([-np.linspace(0, 10, 50), np.full(50, 5.0)]))
    assert restless["setback"] == pytest.approx(1.5, abs=0.02)
