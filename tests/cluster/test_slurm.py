"""Slurm: real daemons on hosts of this machine, our scripts and our provider of nodes on them."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import yaml

from cluster.providers.slurm import SlurmNodeProvider
from tests.clones import repository
from tests.cluster.netlab import wait_for

pytestmark = pytest.mark.slurm


def test_nodes_are_separate_hosts(slurm):
    told = slurm.run("login", "srun", "-N3", "sh", "-c", "echo $(hostname) $(hostname -I)").stdout
    assert sorted(told.splitlines()) == [f"{node} {slurm.address[node]}" for node in slurm.nodes]


def test_a_job_has_its_gpus_and_its_exit_code(batch):
    state, code, printed = batch("-N1", "--gpus-per-node=2", "--wrap", "echo gpus=$CUDA_VISIBLE_DEVICES; exit 7")
    assert (state, code, printed.strip()) == ("FAILED", 7, "gpus=0,1")


# -- our provider of nodes, as the launcher calls it on the login host

NODE = {"sbatch": ["--nodes=1", "--exclusive", "--mem=0"]}
HEAD = {"ray-node-type": "head", "ray-node-status": "uninitialized"}


@pytest.fixture
def provider(slurm, monkeypatch):
    """SlurmNodeProvider in this process, whose Slurm commands run on the login host."""
    for name in ("squeue", "sbatch", "srun", "scancel", "scontrol"):
        path = slurm.home / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\nexec {shlex.join(slurm.enter("login"))} {shutil.which(name)} "$@"\n')
        path.chmod(0o755)
    for key in ("SLURM_CONF", "HOME"):
        monkeypatch.setenv(key, slurm.env[key])
    monkeypatch.setenv("PATH", f"{slurm.home}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(socket, "gethostbyname", slurm.address.__getitem__)
    yield SlurmNodeProvider({"prolog": "export GREETING=hello"}, "lab")
    slurm.run("login", "scancel", "--user=root")
    wait_for(lambda: not slurm.jobs(), 60, "jobs do not end")


def _runner(provider, node):
    return provider.get_command_runner("", node, {}, "lab", subprocess, True)


def test_a_node_is_a_job_with_tags(slurm, provider):
    ((node, _),) = provider.create_node(NODE, HEAD, 1).items()
    wait_for(lambda: provider.is_running(node), 30, "it does not run")
    assert slurm.jobs() == {node: "RUNNING"}
    assert provider.non_terminated_nodes({"ray-node-type": "head"}) == [node]
    assert provider.non_terminated_nodes({"ray-node-type": "cpu"}) == []
    provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
    another = SlurmNodeProvider({}, "lab")  # as the head's autoscaler sees it
    assert another.node_tags(node) == {"ray-node-type": "head", "ray-node-status": "up-to-date"}
    assert provider.internal_ip(node) in slurm.address.values()
    assert SlurmNodeProvider({}, "another").non_terminated_nodes({}) == []
    provider.terminate_node(node)
    wait_for(lambda: provider.is_terminated(node), 30, "it does not end")
    with pytest.raises(RuntimeError, match="Slurm keeps 1024"):
        provider.create_node(NODE, {"tag": "x" * 2000}, 1)


def test_commands_files_and_exit_codes_pass(slurm, provider, tmp_path):
    ((node, _),) = provider.create_node(NODE, HEAD | {"ray-node-kind": "head"}, 1).items()
    runner = _runner(provider, node)
    told = runner.run("echo $GREETING $NAME $CLUSTER_PORT", with_output=True, environment_variables={"NAME": "a b"})
    assert told.split() == ["hello", "a", "b", str(provider.port())]
    with pytest.raises(click.ClickException, match=rf"exit code 7 on node\d \(Slurm job {node}\)") as failed:
        runner.run("exit 7")
    assert failed.value.exit_code == 7
    runner.run("nohup sleep 300 & echo this is no ray start")  # what a daemon is started with
    assert "sleep 300" in runner.run("ps -e -o args", with_output=True)

    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "file").write_text("content")
    (folder / "left").write_text("")
    runner.run_rsync_up(str(folder), "~/there", {"rsync_exclude": ["left"]})
    runner.run_rsync_up(str(folder / "below" / "file"), "~/ray_bootstrap_config.yaml")
    assert (slurm.home / "there" / "below" / "file").read_text() == "content"
    assert not (slurm.home / "there" / "left").exists()
    assert (slurm.home / ".ray-lab.yaml").read_text() == "content"  # another cluster of this home has another
    runner.run_rsync_down("~/there", str(tmp_path / "back"))
    assert (tmp_path / "back" / "below" / "file").read_text() == "content"
    runner.run_rsync_down("~/there/below/file", str(tmp_path / "one"))
    assert (tmp_path / "one").read_text() == "content"
    with pytest.raises(click.ClickException, match="copying to or from"):
        runner.run_rsync_down("~/nowhere", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_full_queue_is_waiting_and_a_job_that_has_ended_an_error(slurm, provider, capsys):
    first = list(provider.create_node(NODE, HEAD | {"ray-node-kind": "head"}, 3))
    wait_for(lambda: all(provider.is_running(each) for each in first), 30, "they do not run")
    ((last, _),) = provider.create_node(NODE, {"ray-node-type": "cpu"}, 1).items()
    told = []
    waiting = threading.Thread(target=lambda: told.append(_runner(provider, last).run("hostname", with_output=True)))
    waiting.start()
    wait_for(lambda: "waits in the queue" in capsys.readouterr().out, 30, "it says nothing")
    assert not told
    provider.terminate_node(first[2])
    waiting.join(30)
    assert told[0].strip() in slurm.nodes
    provider.terminate_node(last)
    wait_for(lambda: last not in slurm.jobs(), 60, "it does not end")
    with pytest.raises(click.ClickException, match=f"Slurm job {last} has ended"):
        _runner(provider, last).run("true")


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
