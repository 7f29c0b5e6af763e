"""Bits a value of real images: closed forms, and the stage on digits with real Ray processes."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import likelihood, prepare, schedule, select, train
from pipeline._sampler import Sampler
from pipeline._stage import StageError
from pipeline._store import read_json, replacing_folder

MEAN, STD = 0.45, 0.1  # of Gaussian pixels in [0, 1]


def sampler(params, space="pixels"):
    return Sampler(
        network={"name": "ncsnv2"},
        space=space,
        shape=(1, 4, 4),
        weights="ema",
        weights_sha256="",
        step=1,
        method="annealed_langevin",
        schedule=schedule.choose(params.noise, torch.rand(20, 1, 4, 4), space),
        denoise=True,
        precision="fp32",
        seed=0,
    )


@pytest.mark.parametrize("space", likelihood.RANGES)
@pytest.mark.parametrize("noise", ["auto", "ve", "vp", "subvp"])
def test_bits_of_gaussian_pixels(compose_params, noise, space):
    """A byte's bits are -log2 of 1/256 times the density of the data blurred by sigma_L, which is known, whatever the
    space and the SDE; but for the prior, which is not quite the distribution at the largest level."""
    scale = likelihood.RANGES[space]
    mean, std = (MEAN, STD) if space == "pixels" else (2 * MEAN - 1, 2 * STD)
    # of the largest level of auto and ve: with it the prior, which has no mean, is that of the data within 1e-3
    ends = ["noise.sigma_1=50"] if noise in ("auto", "ve") else []
    params = compose_params(f"noise={noise}", f"noise.sigma_L={0.02 * scale}", *ends)
    base = sampler(params, space)
    rows, generator = torch.arange(6), torch.Generator().manual_seed(0)
    values = (MEAN + STD * torch.randn(6, 1, 4, 4, generator=generator)).clamp(0.1, 0.9)
    pixels = (values * 255).round().to(torch.uint8)
    judge = likelihood.Judge(base, {"test": rows.numpy()}, passes=2, probes=1, tolerance=1e-5, seed=0)

    def network(x, sigma):
        return (mean - x) / (std**2 + sigma.view(-1, 1, 1, 1) ** 2)

    found = judge.bits(SimpleNamespace(module=network), "test", rows, pixels)
    x = (pixels.double() + 0.5) / 256
    exact = torch.distributions.Normal(MEAN, math.hypot(STD, 0.02)).log_prob(x).flatten(1).mean(1)
    assert torch.allclose(found[:, 0], 8 - exact / math.log(2), atol=0.03)
    assert ((found[:, 1] > 10) & (found[:, 1] < 300)).all()


def test_bits_of_pixels_that_do_not_know_of_each_other():
    """Two values are always 7, of which 30 of 30 were seen; the other two are 7 and 9 by turns. With as little blur as
    between two bytes, of which the density at a byte itself is 1 / (sqrt(2 pi) blur); with much, of that alone."""
    x = np.full((30, 1, 2, 2), 7, np.uint8)
    x[::2, 0, 1] = 9
    seen = [31 / 286] * 2 + [16 / 286] * 2
    little, peak = 1 / 256 / 10, 256 * 10 / math.sqrt(2 * math.pi)
    assert likelihood.independent_bits(x, x[:2], little) == pytest.approx(8 - np.log2(np.multiply(seen, peak)).mean())
    assert likelihood.independent_bits(x, x[:2] + 1, little) == pytest.approx(8 - np.log2(peak / 286))
    wide = likelihood.independent_bits(x, x[:2], 5.0)
    assert wide == pytest.approx(8 + np.log2(5 * math.sqrt(2 * math.pi)), abs=0.01)


def test_what_has_no_flow_or_no_volume_is_refused(compose_params):
    base = sampler(compose_params())
    likelihood.check(base)
    with pytest.raises(StageError, match="the ncsn in out/train knows no levels between its own"):
        likelihood.check(dataclasses.replace(base, network={"name": "ncsn", "sigmas": [1.0, 0.1]}))
    with pytest.raises(StageError, match=r"train.space=logits: expected pixels or centred"):
        likelihood.check(dataclasses.replace(base, space="logits"))


@pytest.fixture
def trained(compose_params, workdir):
    """Digits, and networks that were not trained in place of trained ones."""
    params = compose_params("experiment=tiny", "noise=ve", "model=ncsnpp", "model.width=8")
    prepare.main(params)
    schedule.main(params)
    network = train.describe(params.model, 1, schedule.load())
    one, other = (train.initial_network(network, seed).state_dict() for seed in (0, 1))
    with replacing_folder(train.OUT) as out:
        train.write_model(out, one, other, {"network": network, "space": "pixels", "step": 9})
    select.main(params)
    return params


@pytest.mark.usefixtures("one_cluster")
def test_the_stage_judges_and_goes_on_where_it_stopped(trained, monkeypatch):
    monkeypatch.setattr(likelihood, "BLOCK", 3)
    settings = {"n": 5, "passes": 2, "probes": 2, "tolerance": 1e-2}
    likelihood.main(trained, **settings)
    found = read_json(likelihood.OUT / "likelihood.json")
    (place,) = likelihood.Path("runs").glob("likelihood-*")
    blocks = sorted(place.iterdir())
    assert [path.name for path in blocks] == [
        f"{split}_{ends}.json" for split in ("test", "train") for ends in ("000000_000003", "000003_000005")
    ]
    test, train_set = found["passports"]
    assert test["name"] == "bits_per_dim_digits_test_5"
    assert (test["set"], train_set["set"], test["n"]) == ("test", "train", 5)
    assert {"passes": 2, "probes": 2, "dequantisation": "uniform", "probe": "Rademacher"}.items() <= test[
        "settings"
    ].items()
    assert test["checkpoint"]["step"] == 9
    values = np.concatenate([read_json(path) for path in blocks[:2]])[:, 0]
    assert test["value"] == pytest.approx(values.mean())
    assert test["std_error"] == pytest.approx(values.std(ddof=1) / 5**0.5)
    assert 0 < found["independent_pixels"] < 8
    assert Image.open(likelihood.OUT / "likelihood.png").width > 500
    blocks[0].unlink()
    kept = blocks[1].stat().st_mtime_ns
    likelihood.main(trained, **settings)
    assert blocks[0].is_file()
    assert blocks[1].stat().st_mtime_ns == kept
    assert read_json(likelihood.OUT / "likelihood.json")["passports"][0]["value"] == pytest.approx(test["value"])


def test_settings_that_cannot_be_are_refused(params):
    with pytest.raises(StageError, match="--n 1: expected at least 2 images"):
        likelihood.main(params, n=1, passes=1, probes=1, tolerance=1e-3)
    with pytest.raises(StageError, match="--tolerance 0: expected a number > 0"):
        likelihood.main(params, n=2, passes=1, probes=1, tolerance=0.0)
