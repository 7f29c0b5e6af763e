"""`ray up|submit|exec|down` with both of our providers: real Ray on hosts of this machine."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clones import repository
from tests.cluster.netlab import wait_for

TOOLS = f"export PATH={Path(sys.executable).parent}:$PATH AUTOSCALER_UPDATE_INTERVAL_S=1\n"
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


def launched(lab, host, folder, kind, node):
    """The cluster's yaml as it is, but for small nodes and the packages of this machine."""
    clone = repository(folder)
    file = f"cluster/{kind}.yaml"
    config = yaml.safe_load((clone / file).read_text())
    config |= {"setup_commands": [], "idle_timeout_minutes": 0.2}
    types = config["available_node_types"]
    types["head"]["node_config"] = types["worker"]["node_config"] = node
    types["worker"] |= {"resources": {"CPU": 2}, "max_workers": 2}
    config["provider"]["prolog"] += "\n" + TOOLS + FASTER
    (clone / file).write_text(yaml.safe_dump(config))
    return Launched(lab, host, clone, file)


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


SCRIPT = """
import os, socket, sys, ray
from pathlib import Path
ray.init(os.environ["RAY_ADDRESS"], logging_level="ERROR")
print("driver on", socket.gethostname(), "given", sys.argv[1:])
print("task on", ray.get(ray.remote(socket.gethostname).options(num_cpus=2).remote()))
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


@pytest.mark.slow
@pytest.mark.hosts
def test_the_graph_runs_on_pods(on_pods):
    told = on_pods.ray("submit", "--start", "cluster/repro.py", "--", "experiment=tiny", seconds=1200)
    assert "brought back out/report.html" in told.stdout
    assert (on_pods.clone / "out" / "report.html").is_file()
    assert (on_pods.clone / "dvc.lock").is_file()
