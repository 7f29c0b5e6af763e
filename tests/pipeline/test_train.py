"""The training stage without Ray: the same loop in this process. With Ray, and killed: tests/test_graph.py."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch

from pipeline import _ray, _track, schedule, train


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
    from safetensors.torch import load_file

    network.load_state_dict(load_file(train.OUT / "ema.safetensors"))
    initial = load_file(train.OUT / "initial.safetensors")
    assert any(not torch.equal(value, initial[name]) for name, value in network.state_dict().items())


def test_two_workers_see_together_what_one_sees(job):
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
    import pickle

    run = _track.Run("sqlite:///x.db", "abc")
    assert pickle.loads(pickle.dumps(run)) == run
