"""`ray up|submit|exec|down` with both of our providers: real Ray on hosts of this machine."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline import _checkpoints
from pipeline._store import read_json, store
from tests.clones import ROOT, repository
from tests.cluster.netlab import wait_for
from tests.stages import alone, losses, slowed, workers_on

TOOLS = f"export PATH={Path(sys.executable).parent}:$PATH AUTOSCALER_UPDATE_INTERVAL_S=1\n"
TOOLS += "export OMP_NUM_THREADS=1\n"  # all hosts compute on the cores of this machine
FASTER = (
    "export RAY_health_check_initial_delay_ms=1000 RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=2000\n"
)
FASTER += "export RAY_health_check_failure_threshold=3\n"


@dataclass
class Launched:
    """A clone, and Ray's launcher in it, on the host where a user sits."""

    lab: Any
    host: str
    clone: Path
    file: str

    def ray(self, command, *words, seconds=600, check=True):
        enter = ["sh", "-c", 'cd "$0" && exec "$@"', self.clone]
        told = self.lab.run(
            self.host, *enter, "ray", command, self.file, *words, env=self.env(), timeout=seconds, check=check
        )
        print(told.stdout, told.stderr)
        return told

    def env(self):
        return {"PYTHONPATH": str(self.clone)}

    def change(self, node_type, **settings):
        """Settings of one of the yaml's types of nodes."""
        config = yaml.safe_load((self.clone / self.file).read_text())
        config["available_node_types"][node_type] |= settings
        (self.clone / self.file).write_text(yaml.safe_dump(config))

    def spawn(self, log, command, *words):
        enter = ["sh", "-c", 'cd "$0" && exec "$@"', self.clone]
        return self.lab.spawn(self.host, *enter, "ray", command, self.file, *words, log=log, env=self.env())

    def attach(self, typed):
        """What a terminal shows in which `ray attach` runs and this is typed."""
        mine, theirs = pty.openpty()
        command = [*self.lab.enter(self.host), "sh", "-c", 'cd "$0" && exec ray attach "$1"', self.clone, self.file]
        variables = self.lab.env | self.env() | {"TERM": "dumb"}
        with subprocess.Popen(command, env=variables, stdin=theirs, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            threading.Timer(120, process.kill).start()
            os.write(mine, typed.encode())
            shown = b""
            with suppress(OSError):  # which is how a terminal ends
                while part := os.read(mine, 4096):
                    shown += part
        os.close(mine)
        return shown.decode()


def launched(lab, host, folder, kind, node):
    """The cluster's yaml as it is, but for small nodes and the packages of this machine."""
    clone = repository(folder)
    file = f"cluster/{kind}.yaml"
    config = yaml.safe_load((clone / file).read_text())
    config |= {"setup_commands": [], "idle_timeout_minutes": 0.2}
    types = config["available_node_types"]
    types["head"]["node_config"] = types["worker"]["node_config"] = node
    types["worker"] |= {"resources": {"CPU": 1}, "max_workers": 2}  # one worker of a run on each
    config["provider"]["prolog"] += "\n" + TOOLS + FASTER
    (clone / file).write_text(yaml.safe_dump(config))
    return Launched(lab, host, clone, file)


@pytest.mark.parametrize("kind", ["slurm", "kubernetes", "aws"])
def test_ray_takes_the_yaml(kind):
    config = yaml.safe_load((ROOT / "cluster" / f"{kind}.yaml").read_text())
    validate_config(prepare_config(config))
    for local in config["file_mounts"].values():
        assert (ROOT / local).exists() or local.startswith("~")


@pytest.fixture
def on_slurm(slurm):
    cluster = launched(
        slurm, "login", slurm.home / "clone", "slurm", {"sbatch": ["--nodes=1", "--exclusive", "--mem=0"]}
    )
    yield cluster
    cluster.ray("down", "-y")
    wait_for(lambda: not slurm.jobs(), 60, "jobs are left")


@pytest.fixture
def on_pods(kube):
    box = {"name": "ray", "command": ["sh", "-c", "trap exit TERM; sleep infinity & wait"]}
    cluster = launched(kube, "control", kube.home / "clone", "kubernetes", {"spec": {"containers": [box]}})
    yield cluster
    cluster.ray("down", "-y")
    assert not kube.pods


TRAINING = [
    "experiment=tiny",
    "model=ncsnv2",
    "train.steps=400",
    "train.save_every=20",
    "runtime.workers=[1,2]",
    "runtime.resize_interval=5",
]


def reached(storage):
    """The last step of which there is a checkpoint, whole."""
    whole = storage.glob(f"train-*/step_*/{_checkpoints.META}")
    return max((int(path.parent.name.removeprefix("step_")) for path in whole), default=0)


def nodes(slurm, kind):
    """Job and host of each of the cluster's nodes of a kind."""
    told = slurm.run("login", "squeue", "-h", "-t", "RUNNING", "-o", "%A|%N|%k").stdout
    jobs = [line.split("|", 2) for line in told.splitlines()]
    return [(job, host) for job, host, tags in jobs if json.loads(tags)["ray-node-type"] == kind]


@pytest.mark.slurm
def test_the_graph_goes_on_when_a_host_is_lost_and_when_one_comes(slurm, on_slurm, tmp_path, monkeypatch):
    """The whole graph by `ray submit`: the head's autoscaler makes two workers; in mid-training the host of one is
    switched off, and on again, for another worker. What the network learns is what it learns on one worker alone.
    """
    on_slurm.change("worker", min_workers=2)
    log = tmp_path / "log"

    def told():
        return log.read_text()[-3000:]

    steps = 96
    # a low rate, so that float summation does not grow into other curves
    training = ["model=ncsnv2", f"train.steps={steps}", "train.save_every=8"]
    training += ["train.learning_rate=1e-5", "train.warmup=0"]
    settings = ["experiment=tiny", f"train.preview_every={steps}", "runtime.workers=[1,2]", "runtime.resize_interval=2"]
    graph = on_slurm.spawn(log, "submit", "--start", "cluster/repro.py", "--", *settings, *training)

    def until(holds):
        wait_for(lambda: holds() or graph.poll() is not None, 400, told)
        assert graph.poll() is None, told()

    def grown(text):
        return "2 workers, " in text

    until(lambda: grown(log.read_text()))
    with slowed(workers_on(slurm)[0]):
        until(lambda: reached(on_slurm.clone / "runs") >= 8)
        before, at = len(log.read_text()), reached(on_slurm.clone / "runs")
        victim = nodes(slurm, "worker")[0][1]
        slurm.power_off(victim)
    with ExitStack() as until_grown:
        try:
            shown = on_slurm.attach("echo $(hostname) has $((40 + 2)); exit\n")
            assert f"{nodes(slurm, 'head')[0][1]} has 42" in shown
            until(lambda: "1 worker, on CPUs, 1 for each" in log.read_text()[before:])
            until(lambda: reached(on_slurm.clone / "runs") > at)
            (worker,) = workers_on(slurm)
            until_grown.enter_context(slowed(worker))
        finally:  # other tests have the same hosts
            slurm.boot_node(victim)
        until(lambda: grown(log.read_text()[before:]))
    assert graph.wait(500) == 0, told()
    assert log.read_text()[before:].count("going on from step") == 2
    for path in ("out/report.html", "out/evaluate/metrics.json", "dvc.lock"):
        assert (on_slurm.clone / path).is_file()
    assert read_json(on_slurm.clone / "out" / "train" / "model.json")["step"] == steps
    monkeypatch.chdir(on_slurm.clone)
    (run,) = (store(str(each)) for each in on_slurm.clone.glob("runs/train-*"))
    torch.testing.assert_close(losses(run), losses(alone(on_slurm.clone, "here", *training)), rtol=1e-4, atol=0)


def until_two_train(lab, launcher, printed):
    """Wait until a training has gone on, on one worker, slowed down then, and on two."""

    def told(text):
        wait_for(lambda: text in printed() or launcher.poll() is not None, 400, printed)
        assert launcher.poll() is None, printed()

    told("going on from step")
    with slowed(workers_on(lab)[0]):
        told("2 workers, ")


@pytest.mark.slow
@pytest.mark.slurm
def test_the_same_command_goes_on_after_the_loss_of_the_head(slurm, on_slurm, tmp_path):
    """And training grows when a second worker comes."""
    submit = ["submit", "--start", "cluster/repro.py", "--", *TRAINING]
    log = tmp_path / "log"

    def told():
        return log.read_text()[-3000:]

    first = on_slurm.spawn(log, *submit)
    wait_for(lambda: reached(on_slurm.clone / "runs") >= 4 or first.poll() is not None, 400, told)
    slurm.run("login", "scancel", nodes(slurm, "head")[0][0])
    assert first.wait(120) != 0
    at = reached(on_slurm.clone / "runs")
    assert 4 <= at < 400
    second, so_far = on_slurm.spawn(log, *submit), len(log.read_text())
    until_two_train(slurm, second, lambda: log.read_text()[so_far:])
    assert second.wait(500) == 0, told()
    assert (on_slurm.clone / "out" / "report.html").is_file()


SCRIPT = """
import os, socket, sys, ray
from pathlib import Path
ray.init(os.environ["RAY_ADDRESS"], logging_level="ERROR")
print("driver on", socket.gethostname(), "given", sys.argv[1:])

@ray.remote(num_cpus=1)
def where():
    return socket.gethostname()

print("task on", ray.get(where.remote()))
Path("out").mkdir(exist_ok=True)
Path("out/report.html").write_text("report")
sys.exit(3)
"""


@pytest.mark.hosts
def test_a_script_runs_on_pods(on_pods, tmp_path):
    """With a worker that the head's autoscaler makes; what it left comes back, and its exit code; nothing is left."""
    (on_pods.clone / "repro.py").write_text(SCRIPT)
    told = on_pods.ray("submit", "--start", "repro.py", "--", "one", "two", check=False)
    assert told.returncode == 3
    assert "driver on ray-ncsn-head-" in told.stdout
    assert "given ['one', 'two']" in told.stdout
    assert "task on ray-ncsn-worker-" in told.stdout
    assert (on_pods.clone / "out" / "report.html").read_text() == "report"
    (head,) = (pod for pod in on_pods.lab.pods.values() if "head" in pod["metadata"]["name"])
    again = on_pods.ray("submit", "--start", "repro.py", check=False)  # on the same head, which goes on
    assert again.returncode == 3
    assert head["metadata"]["name"] in again.stdout
    shown = on_pods.attach("echo $(hostname) has $((40 + 2)); exit\n")
    assert f"{head['metadata']['name']} has 42" in shown


@pytest.mark.slow
@pytest.mark.hosts
def test_the_graph_on_pods_goes_on_after_ctrl_c_and_the_loss_of_a_pod(on_pods, tmp_path):
    """The same command goes on after Ctrl-C in mid-training, by itself after the loss of a worker's Pod."""
    storage = on_pods.lab.home / "storage"  # which the hosts of a lab see as Pods see a volume
    submit = ["submit", "--start", "cluster/repro.py", "--", *TRAINING, f"runtime.storage={storage}"]
    log = tmp_path / "log"

    def told():
        return log.read_text()[-3000:]

    first = on_pods.spawn(log, *submit)
    wait_for(lambda: reached(storage) >= 20 or first.poll() is not None, 400, told)
    for process in psutil.Process(first.pid).children(recursive=True):
        if "submit" in process.cmdline():
            process.send_signal(signal.SIGINT)
    assert first.wait(120) != 0
    assert 20 <= reached(storage) < 400
    second, so_far = on_pods.spawn(log, *submit), len(log.read_text())
    until_two_train(on_pods.lab, second, lambda: log.read_text()[so_far:])
    worker = next(name for _, name in on_pods.lab.pods if "worker" in name)
    on_pods.lab.fail("default", worker)
    assert second.wait(500) == 0, told()
    assert "brought back out/report.html" in log.read_text()[so_far:]
    assert (on_pods.clone / "out" / "report.html").is_file()
    assert (on_pods.clone / "dvc.lock").is_file()
