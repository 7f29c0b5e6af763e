"""Slurm: real daemons on hosts of this machine, our scripts and our provider of nodes on them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.clones import repository
from tests.cluster.netlab import wait_for

pytestmark = pytest.mark.slurm


def test_nodes_are_separate_hosts(slurm):
    told = slurm.run("login", "srun", "-N3", "sh", "-c", "echo $(hostname) $(hostname -I)").stdout
    assert sorted(told.splitlines()) == [f"{node} {slurm.address[node]}" for node in slurm.nodes]


def test_a_job_has_its_gpus_and_its_exit_code(batch):
    state, code, printed = batch("-N1", "--gpus-per-node=2", "--wrap", "echo gpus=$CUDA_VISIBLE_DEVICES; exit 7")
    assert (state, code, printed.strip()) == ("FAILED", 7, "gpus=0,1")


# -- the launcher itself


@pytest.fixture(scope="module")
def launched(slurm):
    """A clone that all hosts see, and `ray COMMAND cluster/slurm.yaml ...` in it on the login host."""
    clone = repository(slurm.home / "clone")
    config = yaml.safe_load((clone / "cluster" / "slurm.yaml").read_text())
    config |= {"setup_commands": [], "idle_timeout_minutes": 0.2}
    small = {"sbatch": ["--nodes=1", "--exclusive", "--mem=0"]}
    types = config["available_node_types"]
    types["head"]["node_config"] = types["worker"]["node_config"] = small
    types["worker"] |= {"resources": {"CPU": 2}, "max_workers": 2}
    config["provider"]["prolog"] += f"export PATH={Path(sys.executable).parent}:$PATH\n"
    (clone / "cluster" / "slurm.yaml").write_text(yaml.safe_dump(config))

    def launch(command, *words, seconds=600, check=True):
        told = slurm.run(
            "login",
            *("sh", "-c", 'cd "$0" && exec "$@"', clone, "ray", command, "cluster/slurm.yaml", *words),
            env={"PYTHONPATH": str(clone), "AUTOSCALER_UPDATE_INTERVAL_S": "1"},
            timeout=seconds,
            check=check,
        )
        print(told.stdout, told.stderr)
        return told

    yield SimpleNamespace(clone=clone, launch=launch)
    launch("down", "-y")
    wait_for(lambda: not slurm.jobs(), 60, "jobs are left")


@pytest.mark.slow
def test_the_graph_runs_on_jobs(slurm, launched):
    told = launched.launch("submit", "--start", "cluster/repro.py", "--", "experiment=tiny")
    assert "workers     1 on node" in told.stdout
    assert (launched.clone / "out" / "report.html").is_file()
    assert (launched.clone / "dvc.lock").is_file()
    failed = launched.launch("submit", "cluster/repro.py", "--", "noise.L=1000000", "noise.sigma_1=0.001", check=False)
    assert failed.returncode == 1
    assert "error: " in failed.stdout + failed.stderr
