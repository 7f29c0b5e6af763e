"""The stage `schedule`: computed from the data, or as given."""

import dataclasses

import numpy as np
import pytest
import torch

from ncsn import images, noise
from pipeline import _params, schedule


def _images():
    return torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_null_means_computed_from_the_data(params):
    chosen = schedule.choose(params.noise, _images())
    distances = torch.cdist(_images().flatten(1), _images().flatten(1))
    assert chosen["sigma_1"] == pytest.approx(distances.max().item(), rel=1e-5)
    assert chosen["L"] == noise.suggest_levels(chosen["sigma_1"], params.noise.sigma_L, 64, params.noise.overlap)
    assert chosen["sigmas"] == noise.geometric_sigmas(chosen["sigma_1"], params.noise.sigma_L, chosen["L"]).tolist()
    steps = torch.tensor(chosen["step_sizes"])
    assert steps[-1] == pytest.approx(chosen["epsilon"])
    assert [how.split(":")[0] for how in chosen["how"].values()][:2] == ["Technique 1", "Technique 2"]


def test_a_large_set_is_read_only_where_technique_1_samples_it(params, workdir, monkeypatch):
    monkeypatch.setattr(noise, "PAIRWISE_LIMIT", 40)
    monkeypatch.setattr(noise, "PAIRWISE_SAMPLE", 10)
    x = images.to_uint8(_images())
    np.save(workdir / "x.npy", x.numpy())
    mapped = torch.from_numpy(np.load(workdir / "x.npy", mmap_mode="c"))
    assert schedule.choose(params.noise, mapped) == schedule.choose(params.noise, images.to_float(x))
    given = dataclasses.replace(params.noise, sigma_1=3.0)
    assert schedule.choose(given, x.to("meta"))["dim"] == 64  # a meta tensor has no values to read


def test_what_is_given_is_kept(params):
    given = dataclasses.replace(params.noise, sigma_1=3.0, L=7, epsilon=1e-4, spacing="linear")
    chosen = schedule.choose(given, _images())
    assert (chosen["sigma_1"], chosen["L"], chosen["epsilon"]) == (3.0, 7, 1e-4)
    assert chosen["sigmas"] == noise.linear_sigmas(3.0, params.noise.sigma_L, 7).tolist()
    assert set(chosen["how"].values()) == {"given"}


def test_only_one_given_leaves_the_others_to_the_data(params):
    chosen = schedule.choose(dataclasses.replace(params.noise, L=20, epsilon_scale=1.0), _images())
    assert chosen["L"] == 20
    sigmas = torch.tensor(chosen["sigmas"], dtype=torch.float64)
    assert chosen["epsilon"] == noise.suggest_epsilon(sigmas, params.noise.steps_per_level)


def test_the_scale_multiplies_what_technique_4_gives_up_to_the_denoising_step(params):
    def choose(**given):
        return schedule.choose(dataclasses.replace(params.noise, **given), _images())

    one, two, many = (choose(epsilon_scale=scale) for scale in (1.0, 2.0, 1000.0))
    assert two["epsilon"] == 2 * one["epsilon"] < many["epsilon"] == params.noise.sigma_L**2
    assert two["how"]["epsilon"] == "2 times Technique 4 for T = 5 steps a level, at most sigma_L^2"
    assert one["how"]["epsilon"] == "Technique 4 for T = 5 steps a level"
    assert choose(epsilon=1e-4, epsilon_scale=4.0)["epsilon"] == 1e-4


def test_linear_levels_need_their_number(params):
    with pytest.raises(
        _params.ParamsError, match=r"noise.L is not given: .* noise.spacing=linear needs -S noise.L=..."
    ):
        schedule.choose(dataclasses.replace(params.noise, spacing="linear"), _images())


def test_a_last_level_above_the_data_is_refused(params):
    with pytest.raises(_params.ParamsError, match=r"noise.sigma_L=50.0: expected less than sigma_1="):
        schedule.choose(dataclasses.replace(params.noise, sigma_L=50.0), _images())


def test_the_plot_is_a_picture(params, tmp_path):
    from PIL import Image

    for spacing in ("geometric", "linear"):
        chosen = schedule.choose(dataclasses.replace(params.noise, spacing=spacing, L=10), _images())
        schedule.plot(chosen, tmp_path / "schedule.png")
        assert Image.open(tmp_path / "schedule.png").size == (1080, 408)
