"""Training that is killed, stopped and resized: real Ray processes, real signals."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from pipeline import _checkpoints, _params, _ray, prepare, schedule, train
from pipeline._stage import STOPPED
from pipeline._store import store, write_text
from pipeline.compose import compose
from tests.clones import environment, repository

pytestmark = pytest.mark.graph
STEPS = 240
SETTINGS = ["experiment=tiny", f"train.steps={STEPS}", "train.save_every=8", "train.preview_every=400"]
PATIENCE = 240  # seconds for what takes a quarter of a minute on a quiet machine


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A repository with digits and their schedule."""
    folder = repository(tmp_path_factory.mktemp("survival"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        params = _params.parse(compose(SETTINGS))
        prepare.main(params)
        schedule.main(params)
    return folder


@pytest.fixture
def inside(clone, monkeypatch):
    monkeypatch.chdir(clone)
    return clone


class Stage:
    """`python -m pipeline.train` with settings of its own, in a process group of its own."""

    def __init__(self, folder, *overrides, name, **variables):
        self.params = _params.parse(tree := compose([*SETTINGS, f"runtime.storage={name}", *overrides]))
        write_text(folder / f"{name}.yaml", _params.to_yaml(tree))
        self.folder, self.name, self.log = folder, name, folder / f"{name}.log"
        self.command = [sys.executable, "-m", "pipeline.train", "--params", f"{name}.yaml"]
        self.environment = environment() | variables

    def __enter__(self):
        self.output = open(self.log, "ab")
        self.process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=self.environment,
            start_new_session=True,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )
        return self

    def __exit__(self, *exc):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.output.close()

    @property
    def run(self):
        (found,) = (self.folder / self.name).glob("train-*")
        return store(str(found))

    def trained(self, step):
        """Wait until a checkpoint of this step, or a later one, is there."""
        while not (Path(self.name).is_dir() and any(Path(self.name).glob("train-*"))) or not any(
            found >= step for found in _checkpoints.steps(self.run)
        ):
            self.still_there(step)

    def told(self, text):
        """Wait until the stage has printed this."""
        while text not in self.printed():
            self.still_there(text)

    def still_there(self, what, deadline=[0, None]):  # noqa: B006
        if deadline[1] is not (self, what):
            deadline[:] = time.monotonic() + PATIENCE, (self, what)
        assert self.process.poll() is None, f"it ended before {what}: {self.printed()[-3000:]}"
        time.sleep(0.1)

    def printed(self):
        return self.log.read_text(errors="replace")

    def ends(self, status=0, within=PATIENCE):
        assert self.process.wait(within) == status, self.printed()[-3000:]
        return self

    def workers(self):
        """Ray's training workers below the stage."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in below if "RayTrainWorker" in " ".join(process.cmdline())]


def _state(run):
    """The bytes of the last checkpoint but for the curves, whose sums a stop may cut in two."""
    tensors = _checkpoints.read(run, STEPS)
    return {name: value for name, value in tensors.items() if name not in ("curves", "window")}


def _same_bits(one, other):
    a, b = _state(one), _state(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def _losses(run):
    return _checkpoints.read(run, STEPS)["curves"][:, 1]


def _alone(inside, name, **changes):
    """The run of one worker, in this process."""
    params = _params.parse(compose(SETTINGS))
    folder = store(str(inside / name / "train-alone"))
    train.claim(folder, {})
    held_out = prepare.load("test")[0][: train.HELD_OUT]
    job = train.Job(
        params, _ray.Shared(path=(prepare.OUT / "train.npy").resolve()), held_out, (1, 8, 8), schedule.load(), folder
    )
    cores = len(os.sched_getaffinity(0))
    threads = min(cores, _ray.MOST_THREADS)
    torch.set_num_threads(cores // threads)
    try:
        train.fit(job, _ray.World(threads=threads))
    finally:
        torch.set_num_threads(1)
    return folder


def test_a_killed_driver_goes_on_to_the_same_bits(inside):
    with Stage(inside, name="driver") as stage:
        stage.trained(16)
        os.killpg(stage.process.pid, signal.SIGKILL)
        stage.process.wait()
    assert _checkpoints.steps(stage.run)[0] < STEPS
    with stage:
        stage.ends()
    assert "going on from step" in stage.printed()
    _same_bits(stage.run, _alone(inside, "alone"))


def test_killed_and_stopped_workers_go_on_to_the_same_bits(inside):
    with Stage(inside, "runtime.workers=2", name="unbroken") as unbroken:
        unbroken.ends()
    with Stage(inside, "runtime.workers=2", name="broken") as stage:
        stage.trained(16)
        victim = stage.workers()[1]
        victim.kill()
        stage.told("going on from step")
        stage.trained(_checkpoints.steps(stage.run)[0] + 8)
        os.kill(stage.process.pid, signal.SIGTERM)
        started = time.monotonic()
        stage.ends(STOPPED)
        assert time.monotonic() - started < 30
        saved = _checkpoints.steps(stage.run)[0]
        assert f"step {saved} is saved" in stage.printed()
        assert "stopped by SIGTERM" in stage.printed()
    with stage:
        stage.told(f"going on from step {saved}")
        stage.ends()
    _same_bits(stage.run, unbroken.run)
    torch.testing.assert_close(_losses(unbroken.run), _losses(_alone(inside, "one")), rtol=1e-4, atol=0)


def test_usr1_before_training_begins_ends_at_once(inside):
    with Stage(inside, name="early") as stage:
        stage.told("run folder")
        os.kill(stage.process.pid, signal.SIGUSR1)
        stage.ends(STOPPED)
    assert "stopped by SIGUSR1" in stage.printed()
    assert "worker, on CPUs" not in stage.printed()


def test_a_run_that_diverges_ends_in_one_line_without_another_try(inside):
    with Stage(inside, "train.learning_rate=1e30", "train.warmup=0", "train.max_skipped=3", name="diverging") as stage:
        stage.ends(1)
    *_, last = stage.printed().strip().splitlines()
    assert last.startswith("error: ")
    assert "last good checkpoint: step 0 in" in last
    assert stage.printed().count("1 worker, on CPUs") == 1


@contextmanager
def _cluster():
    """A Ray cluster of two nodes on this machine, one CPU each: its address, and functions that kill and add a node."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: sockets
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = environment() | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    ray = str(Path(sys.executable).parent / "ray")
    nodes = []

    def start(*options):
        nodes.append(
            subprocess.Popen(
                [ray, "start", "--block", "--num-cpus=1", "--object-store-memory=100000000", *options],
                env=variables,
                cwd=folder,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def kill(node):
        for process in psutil.Process(node.pid).children(recursive=True):
            process.kill()
        node.kill()
        node.wait()

    head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}"]
    start("--node-ip-address=127.0.0.1", *head)
    try:
        yield f"127.0.0.1:{port}", lambda: start(f"--address=127.0.0.1:{port}"), lambda: kill(nodes[-1])
    finally:
        for node in nodes:
            if node.poll() is None:
                kill(node)
        shutil.rmtree(folder, ignore_errors=True)


def test_nodes_come_and_go(inside):
    elastic = ["runtime.workers=[1, 2]", "runtime.resize_interval=2", f"train.steps={STEPS}"]
    with _cluster() as (address, add, kill):
        add()
        with Stage(inside, *elastic, name="elastic", RAY_ADDRESS=address, RAY_AUTH_MODE="disabled") as stage:
            stage.told("2 workers")
            stage.trained(16)
            kill()
            stage.told("1 worker,")
            stage.trained(_checkpoints.steps(stage.run)[0] + 8)
            add()
            before = stage.printed().count("2 workers")
            while stage.printed().count("2 workers") == before:
                stage.still_there("2 workers again")
            stage.ends()
    torch.testing.assert_close(_losses(stage.run), _losses(_alone(inside, "steady")), rtol=1e-4, atol=0)
    with open(train.OUT / "loss.csv") as file:
        assert int(list(csv.DictReader(file))[-1]["step"]) == STEPS
