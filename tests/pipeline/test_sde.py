"""SDEs in the pipeline: their levels and draws, what is refused, networks of the family trained and drawn from."""

import dataclasses

import pytest
import torch
from safetensors.torch import save

from ncsn import random
from ncsn.sde import VE, VP, SubVP
from pipeline import _params, _ray, prepare, schedule, train
from pipeline._sampler import Drawer, Model, Reverse, Sampler, of_section
from pipeline._store import store

NETWORKS = {"ve": "ncsnpp", "vp": "ddpmpp", "subvp": "ddpm"}


def levels_of(params, space="pixels"):
    return schedule.choose(params.noise, torch.rand(20, 1, 8, 8), space)


@pytest.mark.parametrize("sde", NETWORKS)
def test_levels_are_those_of_equal_times(compose_params, sde):
    """In pixels of [0, 1] half of what the SDE of images in [-1, 1] says; down to sigma_L."""
    params = compose_params(f"noise={sde}", "noise.L=30")
    levels = levels_of(params)
    found = torch.tensor(levels["sigmas"], dtype=torch.float64)
    assert (len(found), levels["L"], levels["spacing"]) == (30, 30, sde)
    assert levels["sigmas"][-1] == pytest.approx(0.05)
    assert levels["sigmas"][0] == pytest.approx(levels["sigma_1"])
    if sde == "ve":
        times = VE(0.05, levels["sigma_1"]).time(found)
        assert levels["sde"]["t_min"] == pytest.approx(0, abs=1e-12)
    else:
        process = {"vp": VP, "subvp": SubVP}[sde](0.1, 20.0)
        times = process.time(2 * found)
        assert levels["sigma_1"] == pytest.approx(float(process.noise_level(torch.ones(1).double())) / 2)
        assert levels_of(params, "centred")["sigma_1"] == pytest.approx(2 * levels["sigma_1"])
    assert torch.allclose(times.diff(), times.diff()[0].expand(29), atol=1e-9)
    assert float(times[0]) == pytest.approx(1)


@pytest.mark.parametrize("sde", NETWORKS)
def test_training_sees_all_levels(compose_params, sde):
    """Times are uniform: of 2,000 samples a tenth in each tenth, no two alike."""
    params = compose_params(f"noise={sde}", "noise.L=10")
    levels = levels_of(params)
    job = train.Job(params, _ray.Shared(), None, (1, 8, 8), levels, None)
    number, sigma, z = train.draws(job, torch.arange(2000))
    assert torch.equal(number, (train.train_positions(seed=0, index=torch.arange(2000)) * 10).long())
    assert len(set(sigma.tolist())) == 2000
    ends = torch.tensor([*levels["sigmas"][:-1], levels["sigma_L"]]).float()
    process, unit = schedule.process(levels["sde"]), levels["sde"]["unit"]
    t = process.time(sigma.double() / unit)
    t_min = levels["sde"]["t_min"]
    assert torch.histc((t - t_min) / (1 - t_min), 10, 0, 1).sub(200).abs().max() <= 3
    assert float(sigma.max()) <= ends[0] * 1.0001
    assert float(sigma.min()) >= ends[-1] * 0.9999
    assert z.shape == (2000, 1, 8, 8)


def test_the_reverse_of_vp_is_the_same_in_pixels_and_centred(compose_params):
    """The same images of the same score, up to rounding, whatever the units that the network sees them in."""
    params = compose_params("noise=vp", "sample=pc", "sample.steps=30")
    drawn = []
    for space, mean, std in (("pixels", 0.5, 0.2), ("centred", 0.0, 0.4)):
        half = dataclasses.replace(params, noise=dataclasses.replace(params.noise, sigma_L=0.2 * std))
        levels = of_section(params.sample, levels_of(half, space))
        index = torch.arange(4)
        noise = random.seeded_noise(0, index)
        start = mean + levels["sigma_1"] * random.normal(0, random.START, index, 0, (1, 4, 4))
        settings = {"denoise": True, "project": None, "observe": None, "noise": noise, "steps": 30}

        def score(x, sigma, mean=mean, std=std):
            return (mean - x) / (std**2 + sigma.view(-1, 1, 1, 1) ** 2)

        x = Reverse.of(levels).draw(score, start, settings)
        drawn.append(x if space == "pixels" else (x + 1) / 2)
    assert torch.allclose(*drawn, atol=1e-4)
    assert drawn[0].std() == pytest.approx(0.2, abs=0.06)


@pytest.mark.usefixtures("workdir")
@pytest.mark.parametrize("sde", NETWORKS)
def test_a_network_of_the_family_learns_digits_and_draws(compose_params, tmp_path, sde):
    """Sixty steps bring the loss below that of a zero score, D / 2 = 32; every method draws finite images with it."""
    small = [f"noise={sde}", f"model={NETWORKS[sde]}", "noise.L=20", "model.width=8", "model.dropout=0.1"]
    quick = ["train.steps=60", "train.learning_rate=3e-3", "train.log_every=20", "train.save_every=60"]
    params = compose_params("experiment=tiny", *small, *quick, "train.preview_every=60", "noise.steps_per_level=1")
    prepare.main(params)
    schedule.main(params)
    levels, folder = schedule.load(), store(str(tmp_path / "run"))
    train.claim(folder, {})
    data = _ray.Shared(path=(prepare.OUT / "train.npy").resolve())
    job = train.Job(params, data, prepare.load("test")[0][:100], (1, 8, 8), levels, folder)
    train.fit(job, _ray.World())
    tensors = train._checkpoints.read(folder, 60)
    assert tensors["curves"][-1, 1] < 27
    weights = save(train.below(tensors, "ema."))
    for choice in ("sample=ald", "sample=dpmpp", "sample=pc", "sample=ode"):
        none = ["sample.snr=null"] if sde == "subvp" else []
        section = compose_params("experiment=tiny", *small, choice, *none).sample
        sampler = Sampler(
            network=job.network,
            space="pixels",
            shape=(1, 8, 8),
            weights="ema",
            weights_sha256="",
            step=60,
            method=section.method,
            schedule=of_section(section, levels),
            denoise=True,
            precision="fp32",
            seed=0,
            snr=section.snr,
            predictor=section.predictor if section.method == "predictor_corrector" else None,
            tolerance=1e-2 if section.method == "rk45" else None,
        )
        drawer = Drawer(sampler, Model(job.network, weights, "fp32", params.runtime))
        x = drawer.pixels(torch.arange(4))
        assert x.isfinite().all()


def test_solvers_start_within_the_levels_of_training(compose_params):
    params = compose_params("noise.L=10", "noise.sigma_1=4", "sample=dpmpp_sde", "sample.sigma_1=5")
    with pytest.raises(_params.ParamsError, match=r"sample.sigma_1=5: expected more than sigma_L"):
        of_section(params.sample, levels_of(params))


def test_what_is_dropped_differs_by_seed_step_and_worker():
    assert len({train.dropout_seed(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)}) == 8


@pytest.mark.usefixtures("workdir")
def test_dropout_is_the_same_in_a_resumed_run(compose_params, tmp_path):
    """To the bit, whatever else has drawn from torch's generator in between."""
    params = compose_params("experiment=tiny", "noise=ve", "model=ncsnpp", "model.width=8", "model.dropout=0.5")
    prepare.main(params)
    schedule.main(params)
    data, ends = _ray.Shared(path=(prepare.OUT / "train.npy").resolve()), []
    for name, stops in (("whole", [None]), ("broken", [8, None])):
        folder = store(str(tmp_path / name))
        train.claim(folder, {})
        for until in stops:
            torch.manual_seed(len(ends) + (until or 0))
            held_out = prepare.load("test")[0][:20]
            train.fit(train.Job(params, data, held_out, (1, 8, 8), schedule.load(), folder, until), _ray.World())
        ends.append(train._checkpoints.read(folder, 12))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items() if key.startswith(("model.", "ema.")))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["model=ddpm"],
            "model.name=ddpm: expected noise.sde=vp or subvp, whose noise it predicts; got noise.sde=none",
        ),
        (["noise=ve", "model=ncsn"], "noise.sde=ve: expected none with model.name=ncsn, which knows no levels between"),
        (["noise=vp", "noise.sigma_1=5"], "noise.sigma_1=5: expected null with noise.sde=vp, where it follows from"),
        (
            ["noise=vp", "noise.L=null"],
            "noise.L=None: expected a whole number >= 2 with noise.sde=vp, as in noise.L=100",
        ),
        (["noise=ve", "noise.spacing=linear"], "noise.spacing=linear: expected geometric with noise.sde=ve"),
        (["noise=vp", "noise.beta_min=30"], "noise.beta_min=30: expected at most noise.beta_max=20"),
        (["noise=vp", "train.space=logits"], "train.space=logits: expected pixels or centred with noise.sde=vp"),
        (["noise=subvp", "sample=pc"], "sample.snr=0.16: expected null with noise.sde=subvp: the steps of a corrector"),
        (
            ["noise=subvp", "sample=pc", "sample.snr=null", "sample.predictor=ancestral"],
            "sample.predictor=ancestral: expected reverse_diffusion or euler_maruyama with noise.sde=subvp",
        ),
        (["noise=vp", "sample=pc", "sample.steps=20"], "sample.steps=20: expected more than noise.beta_max=20 with"),
        (["model.blocks=2"], "model.blocks=2: expected null but for model.name=ncsnpp, ddpmpp, ddpm, which need them"),
        (["model=ncsnpp", "model.dropout=1"], "model.dropout=1.0: expected a number from 0 to less than 1 or null"),
    ],
)
def test_what_cannot_be_is_refused_before_training(compose_params, overrides, told):
    with pytest.raises(_params.ParamsError) as raised:
        compose_params(*overrides)
    assert str(raised.value).startswith(told)
