"""The training stage without Ray: the same loop in this process. With Ray, and killed: tests/test_graph.py."""

import csv
import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from ncsn.losses import denoising_score_matching
from ncsn.training import train_draws
from pipeline import _ray, _track, schedule, train
from pipeline._stage import StageError

ROOT = Path(__file__).parent.parent.parent


class _Log:
    """Stands where the MLflow run would; keeps what it is given."""

    def __init__(self):
        self.rows, self.pictures = [], []

    def metrics(self, values, step):
        self.rows.append((step, values))

    def image(self, pixels, key, step):
        self.pictures.append((key, step))


@pytest.fixture
def job(compose_params, workdir):
    params = compose_params("experiment=tiny", "data.flip=true")
    x = np.random.default_rng(0).integers(0, 256, (50, 1, 8, 8), dtype=np.uint8)
    np.save(workdir / "train.npy", x)
    levels = schedule.choose(params.noise, torch.from_numpy(x) / 255)
    return train.Job(params, workdir / "train.npy", (1, 8, 8), levels, workdir / "run", _Log())


@pytest.fixture
def learn(compose_params, workdir):
    """Train on real digits for 40 steps of 16; the DSM loss of the averaged weights on other noise, and the curves."""

    def run(*overrides):
        params = compose_params(
            "train.steps=40",
            "train.batch_size=16",
            "train.preview_every=40",
            "train.warmup=0",
            "train.level_power=1",
            "noise.sigma_1=1",
            "noise.L=6",
            "noise.steps_per_level=1",
            *overrides,
        )
        x = np.round(load_digits().images * (255 / 16)).astype(np.uint8)[:, None]
        np.save(workdir / "train.npy", x)
        levels = schedule.choose(params.noise, torch.from_numpy(x) / 255)
        job = train.Job(params, workdir / "train.npy", (1, 8, 8), levels, workdir / "run", _Log())
        train.check(job.network, [1, 8, 8])
        train.fit(job, _ray.World())
        state, curves = train.start(job, _ray.World())
        sigmas, index = torch.tensor(levels["sigmas"]), torch.arange(256)
        level, z = train_draws(sigmas, (1, 8, 8), seed=1, index=index)
        with torch.no_grad():
            x = torch.from_numpy(x[:256]) / 255
            return denoising_score_matching(state.ema.model, x, sigmas[level], z).mean().item(), curves[:, 1]

    return run


def _weights(job):
    return (train.checkpoints(job.folder)[0] / "state.safetensors").read_bytes()


def test_a_broken_run_goes_on_to_the_same_bits(job, monkeypatch):
    unbroken = dataclasses.replace(job, folder=job.folder.with_name("unbroken"))
    train.fit(unbroken, _ray.World())

    observe = train.observe

    def breaks(job, state, curves, bar):
        observe(job, state, curves, bar)
        if state.step == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "observe", breaks)
    with pytest.raises(KeyboardInterrupt):
        train.fit(job, _ray.World())
    assert [path.name for path in train.checkpoints(job.folder)] == ["step_00000004", "step_00000000"]
    monkeypatch.setattr(train, "observe", observe)
    train.fit(job, _ray.World())
    assert _weights(job) == _weights(unbroken)


def test_a_run_killed_in_its_last_preview_draws_it_when_it_goes_on(job, monkeypatch):
    def killed(job, state):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "preview", killed)
        with pytest.raises(KeyboardInterrupt):
            train.fit(job, _ray.World())
    assert train.checkpoints(job.folder)[0].name == "step_00000008"
    train.fit(job, _ray.World())
    train.publish(job, "name")
    assert [path.name for path in (train.OUT / "previews").iterdir()] == ["step_00000012.png"]


def test_without_previews_the_rest_is_published(job):
    train.fit(job, _ray.World())
    shutil.rmtree(job.folder / "previews")
    train.publish(job, "name")
    assert (train.OUT / "model.json").is_file()


@pytest.mark.parametrize(
    ("L", "steps_per_level", "side", "images"), [(50, 5, 8, 25), (232, 5, 32, 25), (232, 5, 48, 11), (2311, 3, 256, 4)]
)
def test_a_preview_has_fewer_images_where_they_are_expensive(job, L, steps_per_level, side, images):
    levels = {"L": L, "steps_per_level": steps_per_level}
    assert train.preview_size(dataclasses.replace(job, schedule=levels, shape=(3, side, side))) == images


def test_a_finished_run_has_nothing_left_to_do(job):
    train.fit(job, _ray.World())
    before = _weights(job)
    job.run.rows.clear()
    train.fit(job, _ray.World())
    assert _weights(job) == before
    assert job.run.rows == []


def test_a_damaged_checkpoint_is_reported_and_skipped(job, caplog):
    train.fit(job, _ray.World())
    expected = _weights(job)
    newest = train.checkpoints(job.folder)[0]
    content = (newest / "state.safetensors").read_bytes()
    (newest / "state.safetensors").write_bytes(content[: len(content) // 2])
    train.fit(job, _ray.World())
    assert "step_00000012 is damaged and skipped" in caplog.text
    assert _weights(job) == expected


def test_old_checkpoints_go_and_the_initial_one_stays(job):
    train.fit(job, _ray.World())
    assert [path.name for path in train.checkpoints(job.folder)] == ["step_00000012", "step_00000008", "step_00000000"]


def test_the_curves_are_means_over_samples(job, workdir):
    train.fit(job, _ray.World())
    train.publish(job, "name")
    with open(train.OUT / "loss.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8, 10, 12]
    assert [float(row["loss"]) for row in rows] == pytest.approx([v["train/loss"] for _, v in job.run.rows], rel=1e-5)
    with open(train.OUT / "loss_per_level.csv") as file:
        header, *levels = list(csv.reader(file))
    assert header == ["step", "level_0", "level_1", "level_2", "level_3"]
    assert all(float(cell) > 0 for row in levels for cell in row[1:] if cell)
    model = json.loads((train.OUT / "model.json").read_text())
    assert model["step"] == 12
    assert job.run.pictures == [("train/samples", 12)]
    network = train.build(model["network"])
    assert sum(p.numel() for p in network.parameters()) == model["parameters"]
    network.load_state_dict(load_file(train.OUT / "ema.safetensors"))
    initial = load_file(train.OUT / "initial.safetensors")
    assert any(not torch.equal(value, initial[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("model", "width"),
    [("ncsn", 8), ("ncsn_deeper", 4), ("ncsnv2", 8), ("ncsnv2_deeper", 4), ("ncsnv2_deepest", 4), ("unet", 8)],
)
def test_every_network_learns(learn, model, width):
    loss, curve = learn(f"model={model}", f"model.width={width}")
    assert loss < 64 / 2
    assert curve[-1] < 64 / 2


@pytest.mark.parametrize("loss", [["loss=ssm", "loss.projections=2"], ["loss=ssm_vr"]])
def test_sliced_score_matching_learns_what_denoising_score_matching_judges(learn, loss):
    value, curve = learn("model=unet", "model.width=8", *loss)
    assert value < 64 / 2
    assert curve[-1] < min(curve[0], 0)  # a zero score has 0


def test_two_workers_train_by_second_derivatives_as_one_does(job, compose_params, tmp_path):
    params = compose_params("experiment=tiny", "loss=ssm_vr", "model=ncsn", "train.steps=4", "train.warmup=0")
    job = dataclasses.replace(job, params=params)
    train.fit(job, _ray.World())
    two = dataclasses.replace(job, folder=tmp_path / "two")
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(dataclasses.replace(two, run=None)))  # rank 0 alone logs
    code = f"""
import pickle, torch
from pipeline import _ray, train
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=1, world_size=2)
train.fit(pickle.load(open("{tmp_path}/job.pickle", "rb")), _ray.World(1, 2))
torch.distributed.destroy_process_group()
"""
    other_worker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=2, timeout=timedelta(seconds=120)
    )
    try:
        train.fit(two, _ray.World(0, 2))
    finally:
        torch.distributed.destroy_process_group()
    assert other_worker.wait(60) == 0
    one, other = (load_file(train.checkpoints(each.folder)[0] / "state.safetensors") for each in (job, two))
    assert torch.allclose(one["curves"], other["curves"], rtol=1e-4, equal_nan=True)
    start = load_file(train.checkpoints(job.folder)[-1] / "state.safetensors")
    names = [name for name in start if name.startswith("model.")]
    apart = max((one[name] - other[name]).abs().max().item() for name in names)
    moved = max((one[name] - start[name]).abs().max().item() for name in names)
    rate = params.train.learning_rate
    assert apart < 0.1 * rate * 4  # Adam enlarges roundoff where the gradient is 0
    assert moved > rate


def test_a_size_that_the_network_cannot_take_is_named_before_anything_starts(compose_params, workdir, monkeypatch):
    monkeypatch.setattr(train.prepare, "manifest", lambda: {"shape": [3, 20, 20]})
    monkeypatch.setattr(train.schedule, "load", lambda: {"sigmas": [1.0, 0.1]})
    with pytest.raises(StageError) as caught:
        train.main(compose_params("model=ncsnv2_deepest"))
    assert "data.resolution: the images are 20x20" in str(caught.value)
    assert "model.name=ncsnv2_deepest takes sides that are multiples of 8" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (workdir / "runs").exists()
    with pytest.raises(StageError, match=r"model.name=ncsn: expected sigmas that differ by more than"):
        train.check(train.describe(compose_params("model=ncsn").model, 3, [1.0, 0.9999]), [3, 20, 20])


def test_the_draws_of_a_batch_suit_the_objective(job, compose_params):
    data, sigmas = np.load(job.data), torch.tensor(job.schedule["sigmas"])
    plain = train.batch(job, data, sigmas, 0, _ray.World())
    params = compose_params(
        "experiment=tiny", "data.flip=true", "loss=ssm", "loss.projections=3", "train.dequantise=true"
    )
    x, level, z, v = train.batch(dataclasses.replace(job, params=params), data, sigmas, 0, _ray.World())
    assert torch.equal(level, plain[1])
    assert torch.equal(z, plain[2])
    assert v.shape == (16, 3, 1, 8, 8)
    assert set(v.unique().tolist()) == {-1, 1}
    u = 256 * x - 255 * plain[0]  # what dequantisation adds within a grey level
    assert -1e-4 < u.min() < 0.05
    assert 0.95 < u.max() < 1 + 1e-4


def test_two_workers_see_together_what_one_sees(job):
    sliced = dataclasses.replace(job.params.loss, name="ssm")
    job = dataclasses.replace(job, params=dataclasses.replace(job.params, loss=sliced))
    data, sigmas = np.load(job.data), torch.tensor(job.schedule["sigmas"])
    whole = train.batch(job, data, sigmas, 3, _ray.World())
    halves = [train.batch(job, data, sigmas, 3, _ray.World(rank, 2)) for rank in range(2)]
    for all_at_once, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(torch.cat(parts), all_at_once)


def test_a_loss_that_is_not_finite_stops_with_step_and_level(job):
    job.schedule["sigmas"][2] = float("nan")
    with pytest.raises(FloatingPointError, match=r"loss nan at step \d+, noise level sigma=nan"):
        train.fit(job, _ray.World())
    assert [path.name for path in train.checkpoints(job.folder)] == ["step_00000000"]


def test_weights_that_are_not_finite_are_not_saved(job):
    state, curves = train.start(job, _ray.World())
    with torch.no_grad():
        state.model.begin_conv.weight[0] = float("inf")
    state.step = 1
    with pytest.raises(FloatingPointError, match=r"model.begin_conv.weight is not finite at step 1"):
        train.save(job.folder, state, curves)
    assert [path.name for path in train.checkpoints(job.folder)] == ["step_00000000"]


def test_the_learning_rate_warms_up_and_falls_linearly_or_stays(params):
    constant = dataclasses.replace(params.train, learning_rate=0.1, steps=100, decay="constant", warmup=0)
    linear = dataclasses.replace(constant, decay="linear")
    assert [train.learning_rate(constant, step) for step in (0, 50, 99)] == [0.1, 0.1, 0.1]
    assert [train.learning_rate(linear, step) for step in (0, 50, 99)] == pytest.approx([0.1, 0.05, 0.001])
    warm = dataclasses.replace(constant, warmup=10)
    assert [train.learning_rate(warm, step) for step in (0, 4, 9, 50)] == pytest.approx([0.01, 0.05, 0.1, 0.1])


def test_initial_weights_depend_on_the_seed_alone(job):
    torch.manual_seed(1)
    one, _ = train.start(dataclasses.replace(job, folder=job.folder / "a"), _ray.World())
    torch.manual_seed(2)
    two, _ = train.start(dataclasses.replace(job, folder=job.folder / "b"), _ray.World())
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_the_run_is_a_plain_value():
    run = _track.Run("sqlite:///x.db", "abc")
    assert pickle.loads(pickle.dumps(run)) == run
