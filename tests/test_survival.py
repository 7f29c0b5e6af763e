"""Training that is killed, stopped and resized: real Ray processes, real signals."""

import dataclasses
import operator
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from pipeline import _checkpoints, _params, _ray, doctor, train
from pipeline._stage import STOPPED, StageError
from pipeline.compose import compose
from tests.stages import SETTINGS, Stage, alone, job_of, losses, side_by_side, slowed, workers_below

pytestmark = pytest.mark.graph


def _state(run):
    """The bytes of the last checkpoint but for the curves, whose sums a stop may cut in two."""
    tensors = _checkpoints.read(run, _checkpoints.steps(run)[0])
    return {name: value for name, value in tensors.items() if name not in ("curves", "window")}


def _same_bits(one, other):
    a, b = _state(one), _state(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_killed_driver_and_killed_and_stopped_workers_go_on_to_the_same_bits(inside, tmp_path):
    """To those of two workers without Ray, which train as one does."""
    steps = 120
    settings = ["runtime.workers=2", f"train.steps={steps}"]
    settings += ["model=ncsnv2", "train.batch_size=64"]  # so that the run is not over before the signals come
    with Stage(inside, *settings, name="broken") as stage:
        stage.trained(16)
        stage.kill()
        assert stage.newest < steps
    with stage:
        stage.told("going on from step")
        worker = stage.workers()[1]
        with slowed(worker):
            stage.trained(stage.newest + 8)
        worker.kill()
        stage.until(lambda: stage.printed().count("going on from step") == 2)
        with slowed(stage.workers()[1]):
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
    client = MlflowClient(f"sqlite:///{inside}/mlflow.db")
    same = "params.train.batch_size = '64'"
    (found,) = client.search_runs([client.get_experiment_by_name("ncsn").experiment_id], same)
    logged = {metric.step for metric in client.get_metric_history(found.info.run_id, "train/loss")}
    assert logged == set(range(2, steps + 1, 2))
    unbroken = job_of(inside, "unbroken", *settings)
    side_by_side(unbroken, 2, tmp_path)
    _same_bits(stage.run, unbroken.folder)
    one = alone(inside, "one", *settings)
    torch.testing.assert_close(losses(unbroken.folder), losses(one), rtol=1e-4, atol=0)


def test_a_signal_before_training_begins_ends_at_once(inside):
    with Stage(inside, name="early") as stage:
        stage.told("run folder")
        os.kill(stage.process.pid, signal.SIGUSR1)
        stage.ends(STOPPED)
    assert "stopped by SIGUSR1" in stage.printed()
    assert "1 worker, " not in stage.printed()


@pytest.fixture(scope="module")
def cluster():
    """A local one with room for two workers, for stages that are called in this process; what it was asked by."""
    runtime = _params.parse(compose([*SETTINGS, "runtime.workers=2"])).runtime
    with _ray.cluster(runtime):
        yield runtime


@pytest.mark.usefixtures("cluster")
def test_a_run_that_diverges_ends_without_another_try(inside, monkeypatch, caplog):
    """Of as many workers as a range allows, since the cluster is a local one."""
    caplog.set_level("INFO", "pipeline")
    begun = []

    class Ear(train.Ear):
        def __call__(self, kind, *what):
            begun.extend([kind] if kind == "at" else [])
            super().__call__(kind, *what)

    monkeypatch.setattr(train, "Ear", Ear)
    bad = ["train.learning_rate=1e30", "train.warmup=0", "train.max_skipped=3", "runtime.storage=diverging"]
    with pytest.raises(StageError, match="last good checkpoint: step 0 in"):
        train.main(_params.parse(compose([*SETTINGS, *bad, "runtime.workers=[1,2]"])))
    assert len(begun) == 1
    assert "2 workers, on CPUs" in caplog.text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not Ray's, whose controller is gone


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_dies_too_often_ends_it(inside):
    def kill():
        """The worker, when there is a checkpoint."""
        while not list(Path("unlucky").glob("train-*/step_*8")):
            time.sleep(0.1)
        (worker,) = workers_below(os.getpid())
        worker.kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    with pytest.raises(
        StageError, match=r"^training failed more than runtime.max_failures=0 times, at last: a worker died"
    ):
        long = ["train.steps=4000", "runtime.max_failures=0", "runtime.storage=unlucky"]
        train.main(_params.parse(compose([*SETTINGS, *long])))
    thread.join()


def test_workers_meet_and_what_one_raises_is_raised(inside, cluster):
    met = _ray.meet(doctor.meet, str(inside), cluster)
    assert [(each["rank"], each["sum"], each["backend"]) for each in met] == [(0, 3.0, "gloo"), (1, 3.0, "gloo")]
    with pytest.raises(TypeError, match="unsupported operand"):
        _ray.meet(operator.truediv, 1, dataclasses.replace(cluster, workers=1))
