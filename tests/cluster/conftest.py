"""Clusters of hosts on this machine, one of each kind for the session: a Slurm, and the Pods of Kubernetes."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests.clones import ROOT
from tests.cluster.kubelab import KubeLab
from tests.cluster.netlab import wait_for
from tests.cluster.slurmlab import SlurmLab


def lab_of(kind, **options):
    """A lab that is not up yet, with a home of its own which all hosts share."""
    root = Path(tempfile.mkdtemp(prefix="lab"))
    lab = kind(root, bind=[Path(sys.prefix).resolve(), ROOT], **options)
    lab.home = root / "shared"
    lab.home.mkdir()
    lab.env = {key: value for key, value in lab.env.items() if not key.startswith(("RAY_", "MLFLOW_", "DVC_", "AWS_"))}
    lab.env |= {
        "HOME": str(lab.home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return lab


@pytest.fixture(scope="session")
def slurm():
    lab = lab_of(SlurmLab, nodes=3, gpus=2)
    with lab:
        yield lab
    shutil.rmtree(lab.root)


@pytest.fixture(scope="session")
def kube():
    lab = lab_of(KubeLab)
    with lab:
        yield lab
    shutil.rmtree(lab.root)


@pytest.fixture
def batch(slurm):
    """Run a batch job to its end: its state, exit code and what it printed."""

    def submit(*words, seconds=240):
        out = f"--output={slurm.home}/%j.out"
        job = slurm.run("login", "sbatch", "--parsable", out, *words).stdout.strip()
        printed = slurm.home / f"{job}.out"

        def ended():
            told = slurm.run("login", "scontrol", "-o", "show", "job", job).stdout.split()
            fields = dict(word.split("=", 1) for word in told if "=" in word)
            going = fields["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
            return None if going else (fields["JobState"], int(fields["ExitCode"].partition(":")[0]))

        state, code = wait_for(ended, seconds, lambda: printed.read_text()[-3000:])
        return state, code, printed.read_text()

    yield submit
    slurm.run("login", "scancel", "--user=root")
