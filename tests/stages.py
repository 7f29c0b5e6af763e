"""The stage train as a process of its own, on digits, and clusters of Ray for it."""

import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch

from pipeline import _checkpoints, _params, _ray, prepare, schedule, train
from pipeline._store import store, write_text
from pipeline.compose import compose
from tests.clones import ROOT, environment, repository
from tests.cluster.netlab import wait_for

SETTINGS = ["experiment=tiny", "train.steps=120", "train.save_every=8", "train.preview_every=400"]
PATIENCE = 240  # seconds for what takes a quarter of a minute on a quiet machine


def digits(folder):
    """A repository with digits and their schedule."""
    folder = repository(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        params = _params.parse(compose(SETTINGS))
        prepare.main(params)
        schedule.main(params)
    return folder


class Stage:
    """`python -m pipeline.train` with settings of its own, in a process group of its own; within `with` it runs."""

    stage = "train"
    patience = PATIENCE

    def __init__(self, folder, *overrides, name, **variables):
        tree = compose([*SETTINGS, f"runtime.storage={name}", *overrides])
        write_text(folder / f"{name}.yaml", _params.to_yaml(tree))
        self.folder, self.log = folder, folder / f"{name}.log"
        self.command = [sys.executable, "-m", f"pipeline.{self.stage}", "--params", f"{name}.yaml"]
        self.environment = environment() | {"PYTHONFAULTHANDLER": "1"} | variables

    def __enter__(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                start_new_session=True,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self

    def __exit__(self, *exc):
        if self.process.poll() is None:
            self.kill()

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def run(self):
        """The store of its run, by what it said."""
        return store(re.search(r"run folder (\S+)", self.printed())[1])

    @property
    def newest(self):
        return max(_checkpoints.steps(self.run), default=-1)

    def printed(self):
        return self.log.read_text(errors="replace")

    def until(self, holds):
        """Wait for it, looking for up to a tenth of the time; the stage must not end before."""
        deadline = time.monotonic() + self.patience
        while True:
            looked = time.monotonic()
            if holds():
                return
            assert self.process.poll() is None, f"it ended: {self.printed()[-3000:]}"
            assert time.monotonic() < deadline, f"it takes too long: {self.printed()[-3000:]}"
            time.sleep(max(0.1, 9 * (time.monotonic() - looked)))

    def told(self, text):
        """Wait until it has printed this."""
        self.until(lambda: text in self.printed())

    def trained(self, step):
        """Wait until a checkpoint of this step, or a later one, is there."""
        self.told("run folder")
        self.until(lambda: self.newest >= step)

    def ends(self, status=0):
        try:
            found = self.process.wait(self.patience)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # it prints where its threads are
            time.sleep(3)
            self.kill()  # what it has started, too
            found = "it did not end"
        assert found == status, self.printed()[-5000:]

    def workers(self, title="RayTrainWorker"):
        """Ray's workers below the stage whose command line says so."""
        return workers_below(self.process.pid, title)


def workers_below(process, title="RayTrainWorker"):
    """Ray's workers below a process whose command line says so."""
    found = []
    for each in psutil.Process(process).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it may just have ended
            found += [each] if title in " ".join(each.cmdline()) else []
    return found


def workers_on(lab):
    """Those on all hosts of a lab."""
    return [each for host in list(lab.init.values()) for each in workers_below(host)]


@contextmanager
def slowed(process):
    """Meanwhile a process runs for a tenth of the time, so that it is not done before something else happens."""
    over = threading.Event()

    def pulse():
        with suppress(psutil.NoSuchProcess):
            while not over.is_set():
                process.suspend()
                over.wait(0.9)
                process.resume()
                over.wait(0.1)

    thread = threading.Thread(target=pulse)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Sampling(Stage):
    """`python -m pipeline.sample`, likewise."""

    stage = "sample"

    def place(self):
        """Where its samples wait."""
        found = re.search(r"ema: .* in (\S+)", self.printed())
        return Path(found[1]) if found else None

    def shards(self):
        """The finished shards: the time of writing by name."""
        place = self.place()
        return {path.name: path.stat().st_mtime_ns for path in place.glob("*.json")} if place else {}


def losses(run):
    return _checkpoints.read(run, _checkpoints.steps(run)[0])["curves"][:, 1]


def job_of(inside, name, *overrides):
    """What a stage with these settings would give its workers, for a run in a folder of this name."""
    params = _params.parse(compose([*SETTINGS, *overrides]))
    folder = store(str(inside / name / "train-here"))
    train.claim(folder, {})
    held_out = prepare.load("test")[0][: train.HELD_OUT]
    data = _ray.Shared(path=(prepare.OUT / "train.npy").resolve())
    return train.Job(params, data, held_out, (1, 8, 8), schedule.load(), folder)


def alone(inside, name, *overrides):
    """The run of one worker, in this process."""
    job = job_of(inside, name, *overrides)
    train.fit(job, _ray.World())
    return job.folder


def side_by_side(job, size, folder, others="", tell=lambda kind, *what: None, threads=1):
    """Train on workers of gloo without Ray, this process the first; `others` is code for the rest to run before."""
    (folder / "job.pickle").write_bytes(pickle.dumps(job))
    (folder / "store").unlink(missing_ok=True)
    code = f"""
import pickle, sys, torch
from pipeline import _ray, train
torch.set_num_threads(1)
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://{folder}/store", rank=rank, world_size={size})
{others}
train.fit(pickle.load(open("{folder}/job.pickle", "rb")), _ray.World(rank, {size}, threads={threads}))
torch.distributed.destroy_process_group()
"""
    rest = [subprocess.Popen([sys.executable, "-c", code, str(rank)], cwd=ROOT) for rank in range(1, size)]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=0, world_size=size, timeout=timedelta(seconds=120)
    )
    try:
        train.fit(job, _ray.World(0, size, threads=threads, tell=tell))
    finally:
        torch.distributed.destroy_process_group()
    assert [process.wait(60) for process in rest] == [0] * (size - 1)


class Cluster:
    """A Ray cluster on this machine, one node at first; within `with` it runs."""

    def __init__(self, cpus=1):
        self.folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: paths of sockets
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.cpus, self.nodes = cpus, []

    def __enter__(self):
        port = self.address.partition(":")[2]
        head = ["--head", f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={self.folder}"]
        self._start([], self.cpus, *head, "--include-dashboard=false")
        return self

    def __exit__(self, *exc):
        while self.nodes:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, *prefix):
        """Start a node of one CPU, its command behind a prefix, and wait until it has joined."""
        self._start(prefix, 1, f"--address={self.address}")

    def kill(self):
        """Kill the last node, with all its processes."""
        node = self.nodes.pop()
        for process in [*psutil.Process(node.pid).children(recursive=True), node]:
            with suppress(psutil.NoSuchProcess):  # Ray's end with each other
                process.kill()
        node.wait()

    def _start(self, prefix, cpus, *options):
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", f"--num-cpus={cpus}"]
        # Ray's workers have a niceness of 15 by default, which starves them beside other work
        variables = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        variables["PYTHONUNBUFFERED"] = "1"
        printed = Path(self.folder, f"node{len(self.nodes)}.log")
        with open(printed, "wb") as log:
            node = subprocess.Popen(
                [*prefix, *ray, "--object-store-memory=100000000", *options],
                env=environment() | variables,
                cwd=self.folder,
                start_new_session=True,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.nodes.append(node)
        wait_for(lambda: "Ray runtime started" in printed.read_text() or node.poll(), PATIENCE, printed.read_text)
        assert node.poll() is None, printed.read_text()
