"""The training stage without Ray: the same loop in this process. With Ray, and killed: tests/test_graph.py."""

import csv
import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from ncsn import images
from ncsn.losses import denoising_score_matching
from ncsn.training import train_draws
from pipeline import _checkpoints, _ray, _track, schedule, train
from pipeline._stage import StageError
from pipeline._store import Folder, store
from tests.stages import side_by_side

ROOT = Path(__file__).parent.parent.parent


class _Log:
    """Hears what the workers tell, as the driver would."""

    def __init__(self):
        self.rows, self.pictures = [], []

    def __call__(self, kind, *what):
        if kind == "metrics":
            values, step = what
            self.rows.append((step, values))
        elif kind == "image":
            _, key, step = what
            self.pictures.append((key, step))


@pytest.fixture
def heard():
    return _Log()


@pytest.fixture
def world(heard):
    return _ray.World(tell=heard)


def _job(params, x, folder):
    np.save(folder / "train.npy", x)
    levels = schedule.choose(params.noise, torch.from_numpy(x) / 255)
    runs = store(str(folder / "runs"))
    train.claim(runs / "run", {})
    return train.Job(params, _ray.Shared(path=folder / "train.npy"), x[:20], x.shape[1:], levels, runs / "run")


def _elsewhere(job, name):
    """The same job in another run folder."""
    folder = store(f"{job.folder.uri}-{name}")
    train.claim(folder, {})
    return dataclasses.replace(job, folder=folder)


def _with(job, **changes):
    """The job with other values of params.train."""
    return dataclasses.replace(
        job, params=dataclasses.replace(job.params, train=dataclasses.replace(job.params.train, **changes))
    )


@pytest.fixture
def job(compose_params, workdir):
    params = compose_params("experiment=tiny", "data.flip=true")
    return _job(params, np.random.default_rng(0).integers(0, 256, (50, 1, 8, 8), dtype=np.uint8), workdir)


@pytest.fixture
def learn(compose_params, workdir, world):
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
        job = _job(params, x, workdir)
        train.check(job.network, [1, 8, 8])
        train.fit(job, world)
        state, curves, _ = train.start(job, world)
        sigmas, index = torch.tensor(job.schedule["sigmas"]), torch.arange(256)
        level, z = train_draws(sigmas, (1, 8, 8), seed=1, index=index)
        with torch.no_grad():
            x = torch.from_numpy(x[:256]) / 255
            return denoising_score_matching(state.ema.model, x, sigmas[level], z).mean().item(), curves[:, 1]

    return run


def _weights(job):
    step = _checkpoints.steps(job.folder)[0]
    return (job.folder / f"step_{step:08d}").read("state.safetensors")


def _tensors(job):
    return _checkpoints.read(job.folder, _checkpoints.steps(job.folder)[0])


def test_a_broken_run_goes_on_to_the_same_bits(job, world, monkeypatch):
    unbroken = _elsewhere(job, "unbroken")
    train.fit(unbroken, world)

    observe = train.Observer.__call__

    def breaks(self, *what):
        observe(self, *what)
        if self.state.step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Observer, "__call__", breaks)
        with pytest.raises(KeyboardInterrupt):
            train.fit(job, world)
    assert _checkpoints.steps(job.folder) == [4, 0]
    train.fit(job, world)
    assert _weights(job) == _weights(unbroken)


def test_asked_to_stop_it_saves_at_once_and_goes_on_to_the_same_bits(job, world):
    unbroken = _elsewhere(job, "unbroken")
    train.fit(unbroken, world)
    asked = iter([False] * 4 + [True])
    train.fit(job, dataclasses.replace(world, asked_to_stop=lambda: next(asked)))
    assert _checkpoints.steps(job.folder)[:2] == [5, 4]  # 5 is between two rows of the curves
    assert _tensors(job)["window"].sum() > 0
    assert _checkpoints.about(job.folder, 5)["test_loss"] is None  # there was no time
    train.fit(job, world)
    one, other = _tensors(job), _tensors(unbroken)
    for name, value in other.items():
        if name != "curves":
            assert torch.equal(one[name], value), name
    torch.testing.assert_close(one["curves"], other["curves"], rtol=1e-12, atol=0, equal_nan=True)


def test_asked_to_stop_in_a_preview_it_gives_the_preview_up(job, world):
    asked = iter([False] * 12 + [True] * 2)
    train.fit(job, dataclasses.replace(world, asked_to_stop=lambda: next(asked)))
    assert _checkpoints.steps(job.folder)[0] == 12
    assert not [name for name in job.folder.names() if name.startswith("previews/")]
    assert next(asked, None) is None  # asked once for each of the two networks, which was the end of both


def test_a_run_killed_in_its_last_preview_draws_it_when_it_goes_on(job, world, monkeypatch):
    def killed(job, state, world):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "preview", killed)
        with pytest.raises(KeyboardInterrupt):
            train.fit(job, world)
    assert _checkpoints.steps(job.folder)[0] == 8
    train.fit(job, world)
    train.publish(job, "name")
    assert [path.name for path in (train.OUT / "previews").iterdir()] == ["step_00000012.png"]


def test_without_previews_the_rest_is_published(job, world):
    train.fit(job, world)
    job.folder.remove("previews")
    train.publish(job, "name")
    assert (train.OUT / "model.json").is_file()


@pytest.mark.parametrize(
    ("L", "steps_per_level", "side", "images"), [(50, 5, 8, 25), (232, 5, 32, 13), (232, 5, 48, 5), (2311, 3, 256, 2)]
)
def test_a_preview_has_fewer_images_where_they_are_expensive(job, L, steps_per_level, side, images):
    levels = {"L": L, "steps_per_level": steps_per_level}
    assert train.preview_size(dataclasses.replace(job, schedule=levels, shape=(3, side, side))) == images


def test_a_finished_run_has_nothing_left_to_do(job, world, heard):
    train.fit(job, world)
    before = _weights(job)
    heard.rows.clear()
    train.fit(job, world)
    assert _weights(job) == before
    assert heard.rows == []


@pytest.mark.parametrize("damage", ["shorter", "other bytes", "no state", "no meta", "torn meta"])
def test_a_damaged_checkpoint_is_reported_and_skipped(job, world, caplog, damage):
    train.fit(job, world)
    expected = _weights(job)
    newest = job.folder / "step_00000012"
    content = newest.read("state.safetensors")
    if damage == "shorter":
        newest.write("state.safetensors", content[: len(content) // 2])
    elif damage == "other bytes":
        newest.write("state.safetensors", content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no state":
        newest.remove("state.safetensors")
    elif damage == "no meta":
        newest.remove("meta.json")
    else:
        newest.write("meta.json", newest.read("meta.json")[:30])
    train.fit(job, world)
    if damage != "no meta":  # which is how a save looks that was broken off
        assert "step_00000012 is damaged" in caplog.text
    assert _weights(job) == expected


def test_the_newest_and_the_best_checkpoint_stay(job, world):
    state, curves, window = train.start(job, world)
    for step, loss in ((1, 5.0), (2, 1.0), (3, None), (4, 4.0), (5, 2.0), (6, None)):
        tensors = state.state_dict() | {"curves": curves, "window": window}
        _checkpoints.write(job.folder, tensors, {"step": step, "test_loss": loss}, keep=2)
        if step == 2:
            (job.folder / "step_00000001").remove("meta.json")  # broken off
    assert _checkpoints.steps(job.folder) == [6, 5, 2]
    there = {name.split("/")[0] for name in job.folder.names()}
    assert there == {"identity.json", "step_00000002", "step_00000005", "step_00000006"}


class _Away(Folder):
    """A store that answers no more."""

    def __truediv__(self, name):
        return _Away(f"{self.uri}/{name}")

    def read(self, name):
        raise StageError("still so after 180 s")


def test_a_store_that_is_away_is_no_damage(job, world):
    train.fit(job, world)
    names = job.folder.names()
    away = dataclasses.replace(job, folder=_Away(job.folder.uri))
    with pytest.raises(StageError, match="still so"):
        _checkpoints.newest(away.folder)
    with pytest.raises(StageError, match="still so"):
        _checkpoints.write(away.folder, _tensors(job), {"step": 99, "test_loss": 1.0}, keep=1)
    assert set(names) < set(job.folder.names())


def test_a_checkpoint_comes_in_time_though_the_next_step_to_save_is_far(job, world):
    runtime = dataclasses.replace(job.params.runtime, save_interval=1e-9)
    often = dataclasses.replace(job, params=dataclasses.replace(job.params, runtime=runtime))
    train.fit(_with(often, save_every=100, steps=6), world)
    assert _checkpoints.steps(job.folder)[:2] == [6, 4]  # each time when the curves get a row


def test_a_run_is_trained_by_one_process_at_a_time(job):
    with (
        train._lone(job.folder),
        pytest.raises(StageError, match="is being trained by another process"),
        train._lone(job.folder),
    ):
        pass


def test_a_run_folder_is_not_taken_by_another_configuration(job):
    folder = store(f"{job.folder.uri}-taken")
    train.claim(folder, {"lr": 1})
    train.claim(folder, {"lr": 1})
    with pytest.raises(StageError, match=r"-taken holds a run of other parameters, data or code"):
        train.claim(folder, {"lr": 2})
    assert json.loads(folder.read("identity.json")) == {"lr": 1}


def test_a_worker_that_does_not_see_the_run_folder_says_so(job, world):
    job.folder.remove("identity.json")
    with pytest.raises(StageError, match=r"runtime.storage must be s3://bucket/prefix, or a folder that all nodes"):
        train.fit(job, world)


def test_the_curves_are_means_over_samples(job, world, heard):
    train.fit(job, world)
    train.publish(job, "name")
    with open(train.OUT / "loss.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8, 10, 12]
    assert [float(row["loss"]) for row in rows] == pytest.approx([v["train/loss"] for _, v in heard.rows], rel=1e-5)
    with open(train.OUT / "loss_per_level.csv") as file:
        header, *levels = list(csv.reader(file))
    assert header == ["step", "level_0", "level_1", "level_2", "level_3"]
    assert all(float(cell) > 0 for row in levels for cell in row[1:] if cell)
    model = json.loads((train.OUT / "model.json").read_text())
    assert model["step"] == 12
    assert heard.pictures == [("train/samples_averaged_and_last", 12)]
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


def _same_run(one, other, rate, steps):
    """Whether two runs differ by float summation alone: their curves, and their weights beside what these moved.

    A factor on all gradients does not show, since Adam takes it out: compare their norms too.
    """
    a, b = _tensors(one), _tensors(other)
    assert torch.allclose(a["curves"], b["curves"], rtol=1e-4, equal_nan=True)
    start = train.initial_network(one.network, one.params.train.seed).state_dict()
    apart = max((a[f"model.{name}"] - b[f"model.{name}"]).abs().max().item() for name in start)
    moved = max((a[f"model.{name}"] - value).abs().max().item() for name, value in start.items())
    assert apart < 0.1 * rate * steps  # Adam enlarges roundoff where the gradient is 0
    assert moved > rate


def test_two_workers_train_by_second_derivatives_as_one_does(job, world, compose_params, tmp_path):
    params = compose_params("experiment=tiny", "loss=ssm_vr", "model=ncsn", "train.steps=4", "train.warmup=0")
    job = dataclasses.replace(job, params=params)
    two = _elsewhere(job, "two")
    train.fit(job, world)
    side_by_side(_with(two, steps=4), 2, tmp_path)
    _same_run(job, two, params.train.learning_rate, 4)


def test_the_number_of_workers_may_change_in_mid_run(job, world, heard, tmp_path):
    job = _with(job, decay="constant", warmup=0, batch_size=17)  # shares of 9 and 8, or of 6 and 5
    changing = _elsewhere(job, "changing")
    train.fit(job, world)
    norms = [values["train/gradient_norm"] for _, values in heard.rows]
    heard.rows.clear()
    side_by_side(_with(changing, steps=4), 2, tmp_path, tell=heard)
    train.fit(_with(changing, steps=8), world)
    side_by_side(_with(changing, steps=12), 3, tmp_path, tell=heard, threads=2)
    _same_run(job, changing, job.params.train.learning_rate, 12)
    assert [values["train/gradient_norm"] for _, values in heard.rows] == pytest.approx(norms, rel=1e-3)


def test_all_workers_go_on_in_smaller_parts_where_one_has_no_memory_left(job, world, tmp_path, caplog):
    job = _with(job, warmup=0)
    scarce = _elsewhere(job, "scarce")
    train.fit(job, world)
    hungry = """
objective = train.objective
def hungry(loss):
    def scarce(score, x, *rest):
        if len(x) > 3 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return objective(loss)(score, x, *rest)
    return scarce
train.objective = hungry
"""
    side_by_side(_with(scarce, steps=12), 2, tmp_path, hungry)
    assert "out of memory: going on with train.micro_batch=2" in caplog.text
    _same_run(job, scarce, job.params.train.learning_rate, 12)


@pytest.mark.root
def test_a_full_disk_ends_the_run_and_spoils_no_checkpoint(job, world, small_disk):
    disk = small_disk(1)  # one checkpoint, not two
    full = dataclasses.replace(job, folder=store(str(disk / "run")))
    train.claim(full.folder, {})
    with pytest.raises(StageError, match=r"step_000000\d\d/state.safetensors cannot be written: No space"):
        train.fit(_with(full, save_every=2), world)
    newest = _checkpoints.steps(full.folder)[0]
    assert _checkpoints.read(full.folder, newest)["step"] == newest
    assert not list(disk.rglob("*.part"))


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
        train.check(train.describe(compose_params("model=ncsn").model, 3, {"sigmas": [1.0, 0.9999]}), [3, 20, 20])


def _batch(job, step, world):
    return train.Batches(job, world)(step)


def test_the_draws_of_a_batch_suit_the_objective(job, compose_params, world):
    plain = _batch(job, 0, world)
    params = compose_params(
        "experiment=tiny", "data.flip=true", "loss=ssm", "loss.projections=3", "train.dequantise=true"
    )
    x, level, sigma, z, v = _batch(dataclasses.replace(job, params=params), 0, world)
    assert torch.equal(level, plain[1])
    assert torch.equal(sigma, plain[2])
    assert torch.equal(z, plain[3])
    assert v.shape == (16, 3, 1, 8, 8)
    assert set(v.unique().tolist()) == {-1, 1}
    u = 256 * x - 255 * plain[0]  # what dequantisation adds within a grey level
    assert -1e-4 < u.min() < 0.05
    assert 0.95 < u.max() < 1 + 1e-4


@pytest.mark.parametrize("size", [2, 3])
def test_workers_see_together_what_one_sees(job, world, size):
    sliced = dataclasses.replace(job.params.loss, name="ssm")
    job = dataclasses.replace(job, params=dataclasses.replace(job.params, loss=sliced))
    whole = _batch(job, 3, world)
    parts = [_batch(job, 3, _ray.World(rank, size)) for rank in range(size)]
    for all_at_once, *some in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(some), all_at_once)
    assert max(len(part[0]) for part in parts) - min(len(part[0]) for part in parts) <= 1


@pytest.mark.parametrize("space", ["centred", "logits"])
def test_a_network_may_be_trained_in_another_space(job, world, space):
    job = _with(job, space=space)
    assert job.network["rescale"] is False
    x, *_ = _batch(job, 0, world)
    low, high = {"centred": (-1, 1), "logits": (-14, 14)}[space]
    assert low <= x.min() < low / 2
    assert high >= x.max() > high / 2
    pixels, *_ = _batch(_with(job, space="pixels"), 0, world)
    torch.testing.assert_close(images.SPACES[space][1](x), pixels, rtol=0, atol=2e-6)
    train.fit(job, world)
    train.publish(job, "name")
    assert json.loads((train.OUT / "model.json").read_text())["space"] == space


def test_micro_batches_train_alike(job, world):
    job = _with(job, warmup=0)
    train.fit(job, world)
    small = _elsewhere(_with(job, micro_batch=3), "small")
    train.fit(small, world)
    _same_run(job, small, job.params.train.learning_rate, 12)


def test_out_of_memory_it_goes_on_in_smaller_parts(job, world, monkeypatch, caplog):
    job = _with(job, warmup=0)
    train.fit(job, world)
    scarce, seen = _elsewhere(job, "scarce"), []
    objective = train.objective(job.params.loss)

    def hungry(score, x, sigma, z):
        seen.append(len(x))
        if len(x) > 5 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return objective(score, x, sigma, z)

    with monkeypatch.context() as patch:
        patch.setattr(train, "objective", lambda loss: hungry)
        train.fit(scarce, world)
    assert "out of memory: going on with train.micro_batch=4" in caplog.text
    assert sorted(set(seen)) == [4, 8, 16]
    _same_run(job, scarce, job.params.train.learning_rate, 12)


def test_one_image_that_does_not_fit_ends_the_run(job, world, monkeypatch):
    def hungry(score, x, sigma, z):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(len(x))

    monkeypatch.setattr(train, "objective", lambda loss: hungry)
    with pytest.raises(StageError, match="out of memory with one image at a time"):
        train.fit(job, world)


def test_memory_of_the_machine_that_does_not_suffice_counts_too():
    code = """
import resource, torch
from pipeline import train
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
try:
    torch.empty(2**33)
except RuntimeError as error:
    assert train.out_of_memory(error), error
else:
    raise AssertionError("32 GiB fitted into 8")
assert not train.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_one_bad_step_is_skipped_and_counted(job, world, heard, monkeypatch, caplog):
    objective = train.objective(job.params.loss)
    calls = []

    def bad_once(score, x, sigma, z):
        calls.append(torch.is_grad_enabled())
        loss = objective(score, x, sigma, z)
        return loss * float("nan") if calls.count(True) == 3 and torch.is_grad_enabled() else loss

    with monkeypatch.context() as patch:
        patch.setattr(train, "objective", lambda loss: bad_once)
        train.fit(job, world)
    assert "step 3 skipped" in caplog.text
    assert [values["train/skipped_steps"] for _, values in heard.rows] == [0, 1, 1, 1, 1, 1]
    assert all(value.isfinite().all() for name, value in _tensors(job).items() if "." in name)
    assert _tensors(job)["curves"][:, 1].isfinite().all()
    assert int(_tensors(job)["optimizer.step.begin_conv.bias"]) == 11


def test_a_loss_that_stays_bad_stops_with_step_and_level(job, world, monkeypatch):
    objective, bad = train.objective(job.params.loss), job.schedule["sigmas"][2]

    def bad_level(score, x, sigma, z):
        loss = objective(score, x, sigma, z)
        return loss.where(sigma != torch.tensor(bad), float("inf")) if torch.is_grad_enabled() else loss

    monkeypatch.setattr(train, "objective", lambda loss: bad_level)
    told = rf"not finite in 3 steps in a row .* up to step 3, first of all the loss at noise level sigma={bad:.4g}"
    with pytest.raises(FloatingPointError, match=told):
        train.fit(_with(job, max_skipped=3), world)
    assert _checkpoints.steps(job.folder) == [0]


def test_the_error_of_a_run_that_diverged_travels():
    error = train.DivergedError(7, 3, 0.5)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.step == 7


def test_weights_that_are_not_finite_are_not_saved(job, world):
    state, curves, window = train.start(job, world)
    state.step = 1
    with torch.no_grad():
        state.model.begin_conv.weight[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"model.begin_conv.weight is not finite at step 1"):
        train.save(job, state, curves, window)
    assert _checkpoints.steps(job.folder) == [0]


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_shorter_numbers_train_too(job, world, precision):
    train.fit(job, world)
    short = _elsewhere(_with(job, precision=precision), precision)
    train.fit(short, world)
    a, b = _tensors(job), _tensors(short)
    assert torch.allclose(a["curves"], b["curves"], rtol=0.1, equal_nan=True)
    assert b["model.begin_conv.weight"].dtype == torch.float32
    assert torch.equal(a["model.begin_conv.weight"], b["model.begin_conv.weight"]) == (precision == "tf32")  # on CPUs


@pytest.mark.slow
def test_a_compiled_network_trains_alike(job, world):
    train.fit(job, world)
    runtime = dataclasses.replace(job.params.runtime, compile=True)
    compiled = _elsewhere(dataclasses.replace(job, params=dataclasses.replace(job.params, runtime=runtime)), "compiled")
    train.fit(compiled, world)
    torch.testing.assert_close(_tensors(compiled)["curves"], _tensors(job)["curves"], rtol=1e-5, atol=0, equal_nan=True)


def test_the_learning_rate_warms_up_and_falls_linearly_or_stays(params):
    constant = dataclasses.replace(params.train, learning_rate=0.1, steps=100, decay="constant", warmup=0)
    linear = dataclasses.replace(constant, decay="linear")
    assert [train.learning_rate(constant, step) for step in (0, 50, 99)] == [0.1, 0.1, 0.1]
    assert [train.learning_rate(linear, step) for step in (0, 50, 99)] == pytest.approx([0.1, 0.05, 0.001])
    warm = dataclasses.replace(constant, warmup=10)
    assert [train.learning_rate(warm, step) for step in (0, 4, 9, 50)] == pytest.approx([0.01, 0.05, 0.1, 0.1])


def test_initial_weights_depend_on_the_seed_alone(job, world):
    torch.manual_seed(1)
    one, *_ = train.start(_elsewhere(job, "a"), world)
    torch.manual_seed(2)
    two, *_ = train.start(_elsewhere(job, "b"), world)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_the_run_is_a_plain_value():
    run = _track.Run("sqlite:///x.db", "abc")
    assert pickle.loads(pickle.dumps(run)) == run
