"""Both providers of nodes, as Ray's launcher calls them: on a real Slurm, and on the Pods of a KubeLab."""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
import yaml

from cluster.providers import slurm
from cluster.providers.kubernetes import KubernetesNodeProvider
from cluster.providers.slurm import SlurmNodeProvider, said
from tests.clones import ROOT
from tests.cluster.netlab import wait_for

HEAD = {"ray-node-type": "head", "ray-node-kind": "head", "ray-node-status": "uninitialized"}
WORKER = {"ray-node-type": "worker", "ray-node-kind": "worker"}
POD = {"spec": {"containers": [{"name": "ray", "command": ["sh", "-c", "trap exit TERM; sleep infinity & wait"]}]}}
JOB = {"sbatch": ["--nodes=1", "--exclusive", "--mem=0"]}


@dataclass
class Cloud:
    """A kind of cluster with room for three nodes."""

    kind: Any
    lab: Any
    node: dict
    config: dict = field(default_factory=lambda: {"prolog": "export GREETING=hello"})
    ended: str = ""

    def provider(self, name="lab"):
        return self.kind(self.config, name)


@pytest.fixture
def pods(kube, monkeypatch):
    monkeypatch.setenv("HOME", str(kube.home))
    monkeypatch.setenv("KUBECONFIG", f"{kube.home}/kubeconfig.here")
    yield Cloud(KubernetesNodeProvider, kube, POD, ended="Pod {} has ended: see `kubectl describe pod {}`")
    for pod in list(kube.pods.values()):
        with contextlib.suppress(KeyError):  # it went with its head
            kube.delete("default", pod["metadata"]["name"])


@pytest.fixture
def jobs(slurm, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(slurm.home))
    for name in ("squeue", "sbatch", "srun", "scancel", "scontrol"):  # in this process, on the login host
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\nexec {shlex.join(slurm.enter("login"))} {shutil.which(name)} "$@"\n')
        path.chmod(0o755)
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(socket, "gethostbyname", slurm.address.__getitem__)
    yield Cloud(SlurmNodeProvider, slurm, JOB, ended="Slurm job {} has ended: see `sacct -j {}`")
    slurm.run("login", "scancel", "--user=root")
    wait_for(lambda: not slurm.jobs(), 60, "jobs do not end")


@pytest.fixture(params=[pytest.param("jobs", marks=pytest.mark.slurm), pytest.param("pods", marks=pytest.mark.hosts)])
def cloud(request):
    return request.getfixturevalue(request.param)


def _runner(provider, node):
    return provider.get_command_runner("", node, {}, "lab", subprocess, True)


def _head(cloud, provider):
    ((node, _),) = provider.create_node(cloud.node, HEAD, 1).items()
    return node, _runner(provider, node)


def test_a_node_has_tags_that_others_see(cloud):
    provider = cloud.provider()
    node, _ = _head(cloud, provider)
    wait_for(lambda: provider.is_running(node), 30, "it does not run")
    assert provider.non_terminated_nodes({"ray-node-type": "head"}) == [node]
    assert provider.non_terminated_nodes({"ray-node-type": "worker"}) == []
    provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
    another = cloud.provider()  # as the head's autoscaler sees it
    assert another.node_tags(node) == HEAD | {"ray-node-status": "up-to-date"}
    assert provider.internal_ip(node) in cloud.lab.address.values()
    assert provider.external_ip(node) == another.internal_ip(node)
    assert cloud.provider("another").non_terminated_nodes({}) == []
    provider.terminate_node(node)
    wait_for(lambda: provider.is_terminated(node), 30, "it does not end")
    assert provider.node_tags(node) == {}
    provider.terminate_node(node)  # again is no error
    token = cloud.lab.home / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 32


def test_no_output_is_lost_at_the_end(cloud):
    """The last pieces of two streams come together with the exit code, and with the end of the connection."""
    provider = cloud.provider()
    _, runner = _head(cloud, provider)
    for _ in range(10):
        told = runner.run("head -c 300000 /dev/zero | tr '\\0' x; echo end >&2; printf last", with_output=True)
        assert len(told.replace("end\n", "")) == 300_004
        assert told.endswith(("last", "end\n"))


def test_commands_files_and_exit_codes_pass(cloud, tmp_path, capfd):
    provider = cloud.provider()
    node, runner = _head(cloud, provider)
    told = runner.run("echo $GREETING $NAME $CLUSTER_PORT", with_output=True, environment_variables={"NAME": "a b"})
    assert told.split() == ["hello", "a", "b", str(provider.port())]
    assert runner.run('cd; [ "$CLUSTER_ROOT" = "$OLDPWD" ] && echo at root', with_output=True) == "at root\n"
    runner.run("echo seen; echo 'it''s'; echo as well >&2")
    printed = capfd.readouterr()
    assert "seen\nits\n" in printed.out
    assert "as well\n" in printed.out + printed.err
    with pytest.raises(click.ClickException, match=rf"exit code 7 on .*{node}") as failed:
        runner.run("exit 7")
    assert failed.value.exit_code == 7
    runner.run("setsid nohup sleep 300 >/dev/null 2>&1 & echo this is no ray start")  # what a daemon is started with
    assert "sleep 300" in runner.run("ps -e -o args", with_output=True)
    with pytest.raises(click.ClickException, match="no port forwarding"):
        runner.run("true", port_forward=[(1, 1)])

    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "file").write_text("content")
    (folder / "below" / "large").write_bytes(bytes(range(256)) * 20000)
    (folder / "left").write_text("")
    runner.run_rsync_up(f"{folder}/", "~/there/", {"rsync_exclude": ["left"]})
    runner.run_rsync_up(str(folder / "below" / "file"), "~/ray_bootstrap_config.yaml")
    assert runner.run("cd ~/there; find * -type f | sort", with_output=True).split() == ["below/file", "below/large"]
    assert runner.run("cat ~/.ray-lab.yaml", with_output=True) == "content"  # another cluster of a home has another
    runner.run_rsync_down("~/there", str(tmp_path / "back"))
    assert (tmp_path / "back" / "below" / "large").read_bytes() == bytes(range(256)) * 20000
    runner.run_rsync_down("~/there/below/file", str(tmp_path / "one"))
    assert (tmp_path / "one").read_text() == "content"
    runner.run_rsync_down("~/there/below/file", str(tmp_path))
    assert (tmp_path / "file").read_text() == "content"
    with pytest.raises(click.ClickException, match="copying to or from"):
        runner.run_rsync_down("~/nowhere", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_results_come_back_after_their_script_whether_it_fails_or_not(cloud, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cloud.config |= {"results": {"repro.py": ["out/report", "lock", "absent"]}, "root": "~/clone"}
    provider = cloud.provider()
    monkeypatch.setattr(type(provider), "root", "~/clone")
    _, runner = _head(cloud, provider)
    with pytest.raises(click.ClickException, match="exit code 3"):
        runner.run("mkdir -p out/report; echo 1 >out/report/page; echo 2 >lock; (exit 3) # python ~/repro.py")
    assert (tmp_path / "out" / "report" / "page").read_text() == "1\n"
    assert (tmp_path / "lock").read_text() == "2\n"
    assert not (tmp_path / "absent").exists()
    (tmp_path / "lock").unlink()
    runner.run("true # python ~/another.py")
    assert not (tmp_path / "lock").exists()


def test_ctrl_c_goes_to_the_command_which_may_save(cloud, capfd):
    """And what the command makes of it is the exit code."""
    provider = cloud.provider()
    _, runner = _head(cloud, provider)
    runner.run("true")
    command = "trap 'echo saved; exit 5' INT; echo begun; while :; do sleep 0.1; done"
    seen = []

    def interrupt():
        wait_for(lambda: seen.append(capfd.readouterr().out) or "begun" in "".join(seen), 30, "it does not begin")
        # As a terminal would, to the processes in its foreground: srun is one of them.
        for child in psutil.Process().children(recursive=True):
            if "srun" in child.name():
                child.send_signal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(click.ClickException, match="exit code 5"):
        runner.run(command)
    thread.join()
    assert "saved" in capfd.readouterr().out


def test_a_full_cluster_is_waiting_and_a_node_that_has_ended_an_error(cloud, capsys):
    provider = cloud.provider()
    first, _ = _head(cloud, provider)
    others = list(provider.create_node(cloud.node, WORKER, 2))
    wait_for(lambda: all(provider.is_running(each) for each in [first, *others]), 30, "they do not run")
    ((last, _),) = provider.create_node(cloud.node, WORKER, 1).items()
    assert last in provider.non_terminated_nodes(WORKER)
    told = []
    waiting = threading.Thread(target=lambda: told.append(_runner(provider, last).run("hostname", with_output=True)))
    waiting.start()
    wait_for(lambda: "waits in the queue (" in capsys.readouterr().out, 30, "it says nothing")
    assert not told
    provider.terminate_node(others[0])
    waiting.join(30)
    assert told[0].strip() in cloud.lab.address
    provider.terminate_node(last)
    wait_for(lambda: provider.is_terminated(last), 60, "it does not end")
    with pytest.raises(click.ClickException) as ended:
        _runner(provider, last).run("true")
    assert ended.value.message == cloud.ended.format(last, last)


def test_workers_go_with_their_head(cloud, monkeypatch):
    monkeypatch.setattr(slurm, "HOLDER", slurm.HOLDER.replace("sleep 30", "sleep 1"))
    provider = cloud.provider()
    head, _ = _head(cloud, provider)
    ((worker, _),) = provider.create_node(cloud.node, WORKER, 1).items()
    wait_for(lambda: provider.is_running(worker), 30, "it does not run")
    provider.terminate_node(head)
    wait_for(lambda: provider.non_terminated_nodes({}) == [], 120, "a worker is left")


def test_a_new_head_has_no_workers_of_an_old_one(cloud):
    provider = cloud.provider()
    head, _ = _head(cloud, provider)
    provider.create_node(cloud.node, WORKER, 1)
    provider.terminate_node(head)
    new, _ = _head(cloud, provider)
    wait_for(lambda: provider.non_terminated_nodes({}) == [new], 10, "the old worker is left")


# -- what is of one kind alone


@pytest.mark.slurm
def test_clusters_on_one_host_do_not_clash(jobs):
    """Two heads, started as the yaml says; then one is gone."""
    config = yaml.safe_load((ROOT / "cluster" / "slurm.yaml").read_text())
    (start,) = config["head_start_ray_commands"]
    start = start.replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")
    health = "ray health-check --address=127.0.0.1:$CLUSTER_PORT"
    jobs.node = {"sbatch": ["--oversubscribe", "--mem=1500", f"--nodelist={jobs.lab.nodes[0]}"]}
    tools = Path(sys.executable).parent
    jobs.config = {"prolog": f"export PATH={tools}:$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0"}
    providers = [jobs.provider(name) for name in ("one", "two")]
    heads = [_head(jobs, provider) for provider in providers]
    for _, runner in heads:
        runner.run(start)
    for _, runner in heads:
        assert runner.run("hostname", with_output=True).strip() == jobs.lab.nodes[0]
        runner.run(health)
    gone, _ = heads[0]
    providers[0].terminate_node(gone)
    wait_for(lambda: not providers[0].non_terminated_nodes({}), 60, "it does not end")
    heads[1][1].run(health)


def test_tags_that_slurm_would_cut_are_an_error():
    with pytest.raises(RuntimeError, match="Slurm keeps 1024"):
        said({"tag": "x" * 2000})


@pytest.mark.hosts
def test_a_command_outlives_its_connection(pods, capfd):
    provider = pods.provider()
    _, runner = _head(pods, provider)
    runner.run("true")
    seen = []

    def cut():
        for mark in ("line 3\n", "line 6\n"):
            wait_for(lambda mark=mark: seen.append(capfd.readouterr().out) or mark in "".join(seen), 30, f"no {mark}")
            assert pods.lab.cut() == 1

    thread = threading.Thread(target=cut)
    thread.start()
    with pytest.raises(click.ClickException, match="exit code 9"):
        runner.run("for k in $(seq 9); do echo line $k; sleep 0.5; done; exit 9")
    thread.join()
    seen.append(capfd.readouterr().out)
    assert "".join(seen) == "".join(f"line {k}\n" for k in range(1, 10))


@pytest.mark.hosts
def test_a_pod_that_is_lost_ends_its_command(pods):
    provider = pods.provider()
    node, runner = _head(pods, provider)
    runner.run("true")
    threading.Timer(1.0, pods.lab.fail, ["default", node]).start()
    with pytest.raises(click.ClickException, match=f"Pod {node} has ended"):
        runner.run("sleep 60")
    assert provider.is_terminated(node)


def test_without_a_kubeconfig_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(click.ClickException, match="expected one in KUBECONFIG"):
        KubernetesNodeProvider({}, "lab")
