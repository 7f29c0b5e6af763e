"""Training that is killed, stopped and resized: real Ray processes, real signals."""

import os
import signal
import time

import pytest
import torch
from mlflow import MlflowClient

from pipeline import _checkpoints
from pipeline._stage import STOPPED
from tests.stages import STEPS, Stage, alone, losses

pytestmark = pytest.mark.graph


def _state(run):
    """The bytes of the last checkpoint but for the curves, whose sums a stop may cut in two."""
    tensors = _checkpoints.read(run, _checkpoints.steps(run)[0])
    return {name: value for name, value in tensors.items() if name not in ("curves", "window")}


def _same_bits(one, other):
    a, b = _state(one), _state(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_killed_driver_goes_on_to_the_same_bits(inside):
    with Stage(inside, name="driver") as stage:
        stage.trained(16)
        stage.kill()
        assert stage.newest < STEPS
    with stage:
        stage.ends()
    assert "going on from step" in stage.printed()
    _same_bits(stage.run, alone(inside, "alone"))
    client = MlflowClient(f"sqlite:///{inside}/mlflow.db")
    same = "params.train.batch_size = '16' and params.train.learning_rate = '0.004'"
    (found,) = client.search_runs([client.get_experiment_by_name("ncsn").experiment_id], same)
    logged = {metric.step for metric in client.get_metric_history(found.info.run_id, "train/loss")}
    assert logged == set(range(2, STEPS + 1, 2))


def test_killed_and_stopped_workers_go_on_to_the_same_bits(inside):
    larger = "train.batch_size=64"  # so that the run is not over before the signal comes
    with Stage(inside, larger, "runtime.workers=2", name="unbroken") as unbroken:
        unbroken.ends()
    with Stage(inside, larger, "runtime.workers=2", name="broken") as stage:
        stage.trained(16)
        stage.workers()[1].kill()
        stage.told("going on from step")
        stage.trained(stage.newest + 8)
        os.killpg(stage.process.pid, signal.SIGTERM)  # to Ray's processes too
        started = time.monotonic()
        stage.ends(STOPPED)
        assert time.monotonic() - started < 30
        assert f"step {stage.newest} is saved" in stage.printed()
        assert "stopped by SIGTERM" in stage.printed()
    saved = stage.newest
    with stage:
        stage.told(f"going on from step {saved}")
        stage.ends()
    _same_bits(stage.run, unbroken.run)
    torch.testing.assert_close(losses(unbroken.run), losses(alone(inside, "one", larger)), rtol=1e-4, atol=0)


def test_a_signal_before_training_begins_ends_at_once(inside):
    with Stage(inside, name="early") as stage:
        stage.told("run folder")
        os.kill(stage.process.pid, signal.SIGUSR1)
        stage.ends(STOPPED)
    assert "stopped by SIGUSR1" in stage.printed()
    assert "1 worker, " not in stage.printed()


def test_a_run_that_diverges_ends_in_one_line_without_another_try(inside):
    with Stage(inside, "train.learning_rate=1e30", "train.warmup=0", "train.max_skipped=3", name="diverging") as stage:
        stage.ends(1)
    *_, last = stage.printed().strip().splitlines()
    assert last.startswith("error: ")
    assert "last good checkpoint: step 0 in" in last
    assert stage.printed().count("1 worker, ") == 1


def test_a_worker_that_dies_too_often_ends_in_one_line(inside):
    with Stage(inside, "runtime.max_failures=0", name="unlucky") as stage:
        stage.trained(8)
        stage.workers()[0].kill()
        stage.ends(1)
    *_, last = stage.printed().strip().splitlines()
    assert last.startswith("error: training failed more than runtime.max_failures=0 times, at last: a worker died")
