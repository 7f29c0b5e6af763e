"""Slurm: real daemons on hosts of this machine, our scripts and our provider of nodes on them."""

import sys

import pytest

from tests.clones import repository
from tests.cluster.netlab import wait_for
from tests.stages import slowed, workers_on

pytestmark = pytest.mark.slurm


def test_nodes_are_separate_hosts(slurm):
    told = slurm.run("login", "srun", "-N3", "sh", "-c", "echo $(hostname) $(hostname -I)").stdout
    assert sorted(told.splitlines()) == [f"{node} {slurm.address[node]}" for node in slurm.nodes]


def test_a_job_has_its_gpus_and_its_exit_code(batch):
    state, code, printed = batch("-N1", "--gpus-per-node=2", "--wrap", "echo gpus=$CUDA_VISIBLE_DEVICES; exit 7")
    assert (state, code, printed.strip()) == ("FAILED", 7, "gpus=0,1")


def test_a_batch_job_that_is_told_to_save_goes_on_where_it_was(slurm):
    """Two hosts; USR1 comes as it does before the time limit; the job is put back into the queue by itself."""
    clone = repository(slurm.home / "batch")
    (clone / ".venv").symlink_to(sys.prefix)
    words = ["train", "experiment=tiny", "model=ncsnv2", "train.steps=100", "train.save_every=8"]
    words.append("runtime.workers=2")  # more than one host has room for
    submit = ["sbatch", "--parsable", f"--output={clone}/job.out", "cluster/slurm/train.sbatch", *words]
    quick = {"OMP_NUM_THREADS": "1", "WORKERS_PATIENCE": "3"}  # all hosts compute on the cores of this machine
    told = slurm.run("login", "sh", "-c", 'cd "$0" && exec "$@"', clone, *submit, env=quick)
    job, printed = told.stdout.strip(), clone / "job.out"

    def fields():
        shown = slurm.run("login", "scontrol", "-o", "show", "job", job).stdout.split()
        return dict(word.split("=", 1) for word in shown if "=" in word)

    def steps():
        return {int(path.name.removeprefix("step_")) for path in clone.glob("runs/train-*/step_*")}

    def going():
        return fields()["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")

    def text():
        shown = slurm.run("login", "sh", "-c", f"scontrol -o show job {job}; sinfo -N -l; sinfo -R", check=False).stdout
        return (printed.read_text()[-4000:] if printed.exists() else "nothing printed") + shown

    def begun():
        return printed.exists() and "2 workers, " in printed.read_text()

    wait_for(lambda: begun() or not going(), 400, text)
    with slowed(workers_on(slurm)[0]):
        wait_for(lambda: max(steps(), default=0) >= 4 or not going(), 120, text)
        assert going(), text()
        slurm.run("login", "scancel", "--batch", "--signal=USR1", job)
        wait_for(lambda: fields()["Restarts"] == "1" or not going(), 120, text)
    at = max(steps())
    assert 4 <= at < 100, text()

    wait_for(lambda: fields()["JobState"] in ("CONFIGURING", "RUNNING"), 180, text)
    wait_for(lambda: not going(), 600, text)
    assert (fields()["JobState"], fields()["ExitCode"]) == ("COMPLETED", "0:0"), text()
    assert "told to save and to go on later" in printed.read_text()
    assert f"going on from step {at} " in printed.read_text()
    assert "numbers added up by gloo" in printed.read_text()  # by the doctor
    assert (clone / "out" / "train" / "model.json").is_file()
