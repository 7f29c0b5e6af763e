"""Ray's cluster launcher on Slurm, without SSH: `ray up|submit|exec|attach|rsync-up|rsync-down|down slurm.yaml`.

A node is a job, its id the job's. Its tags are JSON in the job's comment, so that there is no state of our own to lose:
what squeue says is true, from the login node and from the head's autoscaler alike. In the yaml:

    provider:
      type: external
      module: cluster.providers.slurm.SlurmNodeProvider
      prolog: source $HOME/venv/bin/activate   # before every command, in place of a login shell
    available_node_types:
      cpu:
        node_config: {sbatch: [--nodes=1, --exclusive, --mem=0]}

Commands run in the clone, which all nodes have to see (CLUSTER_ROOT), and see CLUSTER_PORT, the first of ten ports that
the cluster's head has for itself, by its job's id.
"""

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND

# Slurm kills what a step leaves behind, so a daemon must be a child of the batch step, which takes commands by a pipe.
HOLDER = r"""#!/bin/bash
d=/tmp/ray-slurm-$SLURM_JOB_ID; rm -rf "$d"; mkdir -m 700 "$d"; mkfifo "$d/in" "$d/out"
trap 'rm -rf "$d"' EXIT
while :; do
  cmd=$(cat "$d/in")
  bash -c "$cmd" </dev/null >"$d/log" 2>&1
  { echo $?; cat "$d/log"; } >"$d/out"
done
"""
IN_HOLDER = r"""d=/tmp/ray-slurm-$SLURM_JOB_ID
until [ -p "$d/out" ]; do sleep 0.1; done
cat >"$d/in"; { read -r rc; cat; } <"$d/out"; exit "$rc"
"""
ROOT = str(Path(__file__).resolve().parent.parent.parent)  # of the clone, which all nodes see
ALIVE = "PENDING,CONFIGURING,RUNNING,SUSPENDED"
COMMENT = 1024  # bytes that Slurm keeps
BOOTSTRAP = "~/ray_bootstrap_config.yaml"  # Ray's, one a home: clusters that share a home would share it
PORTS = 20000, 1000, 10  # the first port, how many clusters on a host, ports for each
POLL, SIGN_OF_LIFE = 1.0, 30.0  # seconds


@dataclass
class Job:
    """What squeue says of a node."""

    state: str
    host: str
    reason: str
    tags: dict[str, str]


def slurm(*words: str, text: str | None = None) -> str:
    """Run a command of Slurm; raises RuntimeError with what it said."""
    done = subprocess.run(words, env=environment(), input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words[0]}: {done.stderr.strip()}")
    return done.stdout


def environment() -> dict[str, str]:
    """Without that of the job in which the head's autoscaler runs, by which sbatch and srun would do other things."""
    ours = ("SLURM_", "SBATCH_", "SRUN_")
    return {key: value for key, value in os.environ.items() if key == "SLURM_CONF" or not key.startswith(ours)}


class SlurmNodeProvider(NodeProvider):  # type: ignore[misc]
    """Nodes are jobs of this user that are called ray-CLUSTER."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self.lock = threading.RLock()
        self.jobs: dict[str, Job] = {}

    def job(self, node_id: str) -> Job | None:
        """What is known of a node, as new as it has to be; None if it has ended."""
        with self.lock:
            if node_id not in self.jobs or self.jobs[node_id].state != "RUNNING":
                self._look()
            return self.jobs.get(node_id)

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        with self.lock:
            self._look()
            return [node for node, job in self.jobs.items() if tag_filters.items() <= job.tags.items()]

    def is_running(self, node_id: str) -> bool:
        job = self.job(node_id)
        return job is not None and job.state == "RUNNING"

    def is_terminated(self, node_id: str) -> bool:
        return self.job(node_id) is None

    def node_tags(self, node_id: str) -> dict[str, str]:
        job = self.job(node_id)
        return dict(job.tags) if job else {}

    def internal_ip(self, node_id: str) -> str | None:
        job = self.job(node_id)
        return socket.gethostbyname(job.host) if job and job.host else None

    def external_ip(self, node_id: str) -> str | None:
        return self.internal_ip(node_id)

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        name = [
            "--parsable",
            f"--job-name={self._name}",
            "--output=/dev/null",
            "--no-requeue",
            f"--comment={said(tags)}",
        ]
        made: dict[str, Any] = {}
        for _ in range(count):
            told = slurm("sbatch", *name, *node_config.get("sbatch", []), text=HOLDER)
            made[told.strip().partition(";")[0]] = {}
        return made

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        with self.lock:
            merged = self.node_tags(node_id) | tags
            slurm("scontrol", "update", f"jobid={node_id}", f"comment={said(merged)}")
            if node_id in self.jobs:
                self.jobs[node_id].tags = merged

    def terminate_node(self, node_id: str) -> None:
        slurm("scancel", node_id)
        with self.lock:
            self.jobs.pop(node_id, None)

    def port(self) -> int:
        """The first of the cluster's ports; raises RuntimeError if it has no head."""
        heads = self.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_HEAD})
        if not heads:
            raise RuntimeError(f"the cluster {self.cluster_name} has no head: its job has ended")
        first, clusters, each = PORTS
        return first + int(heads[0]) % clusters * each

    def get_command_runner(
        self,
        log_prefix: str,
        node_id: str,
        auth_config: dict[str, Any],
        cluster_name: str,
        process_runner: Any,
        use_internal_ip: bool,
        docker_config: dict[str, Any] | None = None,
    ) -> "SrunCommandRunner":
        if docker_config and docker_config.get("container_name"):
            raise click.ClickException("docker is not for Slurm: name a container in the sbatch options, or a venv")
        return SrunCommandRunner(self, node_id)

    @property
    def _name(self) -> str:
        return f"ray-{self.cluster_name}"

    def _look(self) -> None:
        self.jobs = {}
        told = slurm("squeue", "--me", "-h", "-t", ALIVE, "-n", self._name, "-o", "%A|%T|%N|%r|%k")
        for line in told.splitlines():
            job, state, host, reason, comment = line.split("|", 4)
            self.jobs[job] = Job(state, host, reason, json.loads(comment))


def said(tags: Mapping[str, str]) -> str:
    """Tags as a job's comment; raises RuntimeError if they are too long for one."""
    comment = json.dumps(tags, separators=(",", ":"))
    if len(comment.encode()) > COMMENT:
        raise RuntimeError(f"{len(comment)} bytes of tags, Slurm keeps {COMMENT}: expected shorter names in the yaml")
    return comment


class SrunCommandRunner(CommandRunnerInterface):  # type: ignore[misc]
    """Commands on a node by srun, daemons by the batch step of its job."""

    def __init__(self, provider: SlurmNodeProvider, node_id: str) -> None:
        self.provider, self.node_id = provider, node_id

    def run(
        self,
        cmd: str | None = None,
        timeout: int = 120,
        exit_on_fail: bool = False,
        port_forward: Any = None,
        with_output: bool = False,
        environment_variables: dict[str, object] | None = None,
        run_env: str = "auto",
        ssh_options_override_ssh_key: str = "",
        shutdown_after_run: bool = False,
    ) -> str:
        """Run a command, as soon as the job runs; the exit code of the program is then the command's."""
        if port_forward:
            raise click.ClickException("no port forwarding: the login node reaches compute nodes by their names")
        self._running()
        # What --stop appends: there is no "ray teardown" any more, and no machine of ours to shut down.
        cmd, off, _ = (
            (cmd or "sleep infinity").replace("ray teardown ", "ray down ").partition("; sudo shutdown -h now")
        )
        script = self._script(cmd, environment_variables or {})
        if "ray start" in cmd:
            words, options = self._srun("bash", "-c", IN_HOLDER), {"input": script}
        else:
            tty = ["--pty"] if sys.stdin and sys.stdin.isatty() and not with_output else []
            words, options = self._srun(*tty, "bash", "-c", script), {} if tty else {"input": ""}
        pipe = subprocess.PIPE if with_output else None
        done = subprocess.run(words, env=environment(), text=True, stdout=pipe, check=False, **options)  # type: ignore[call-overload]
        if off or shutdown_after_run:
            self.provider.terminate_node(self.node_id)
        if done.returncode:
            error = click.ClickException(f"exit code {done.returncode} on {self._place()}: {cmd}")
            error.exit_code = done.returncode  # type: ignore[misc]  # that of `ray submit`, too
            raise error
        return done.stdout if with_output else ""

    def run_rsync_up(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        """Copy a file or a folder to the node."""
        self._running()
        there = self._path(target)
        if Path(source).is_dir():
            leave = [f"--exclude={each.rstrip('/')}" for each in (options or {}).get("rsync_exclude", [])]
            pack = ["tar", "-C", source, *leave, "-c", "."]
            unpack = f'mkdir -p "{there}" && tar -C "{there}" -x'
        else:
            pack, unpack = (
                ["cat", source],
                f'mkdir -p "$(dirname "{there}")" && cat >"{there}.part" && mv "{there}.part" "{there}"',
            )
        with _piped(pack) as out:
            self._copied(self._srun("bash", "-c", unpack), stdin=out)

    def run_rsync_down(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        """Copy a file or a folder from the node."""
        self._running()
        there, folder = self._path(source.rstrip("/")), Path(target)
        kind = subprocess.run(
            self._srun("bash", "-c", f'[ -d "{there}" ]'), env=environment(), stdin=subprocess.DEVNULL, check=False
        )
        if kind.returncode == 0:
            folder.mkdir(parents=True, exist_ok=True)
            with _piped(self._srun("bash", "-c", f'tar -C "{there}" -c .')) as out:
                self._copied(["tar", "-C", target, "-x"], stdin=out)
            return
        part = folder.with_name(f".{folder.name}.part")
        with open(part, "wb") as out:
            self._copied(self._srun("bash", "-c", f'cat "{there}"'), stdin=subprocess.DEVNULL, stdout=out)
        part.replace(target)

    def remote_shell_command_str(self) -> str:
        return shlex.join(self._srun("--pty", "bash"))

    def _running(self) -> None:
        """Wait until the job runs, however long the queue is; say so."""
        since, said = time.monotonic(), -SIGN_OF_LIFE
        while not self.provider.is_running(self.node_id):
            job = self.provider.job(self.node_id)
            if job is None:
                raise click.ClickException(f"Slurm job {self.node_id} has ended: see `sacct -j {self.node_id}`")
            waited = time.monotonic() - since
            if waited - said >= SIGN_OF_LIFE:
                print(f"Slurm job {self.node_id} waits in the queue ({job.reason}), {waited:.0f} s", flush=True)
                said = waited
            time.sleep(POLL)

    def _script(self, cmd: str, variables: Mapping[str, object]) -> str:
        config, own = self.provider.provider_config, {"CLUSTER_PORT": str(self.provider.port())}
        lines = [f"export CLUSTER_ROOT={shlex.quote(ROOT)}; cd $CLUSTER_ROOT", config.get("prolog", ":")]
        for key, value in {**own, **variables}.items():
            lines.append(f"export {key}={shlex.quote(value if isinstance(value, str) else json.dumps(value))}")
        return "\n".join([*lines, cmd.replace(BOOTSTRAP, self._bootstrap)])

    @property
    def _bootstrap(self) -> str:
        return f"~/.ray-{self.provider.cluster_name}.yaml"

    def _path(self, path: str) -> str:
        path = path.replace(BOOTSTRAP, self._bootstrap)
        return path.replace("~", "$HOME", 1) if path.startswith("~") else path

    def _srun(self, *words: str) -> list[str]:
        return ["srun", f"--jobid={self.node_id}", "--overlap", "--nodes=1", "--ntasks=1", "--quiet", *words]

    def _copied(self, words: list[str], **options: Any) -> None:
        done = subprocess.run(words, env=environment(), check=False, **options)
        if done.returncode:
            raise click.ClickException(f"copying to or from {self._place()} failed: exit code {done.returncode}")

    def _place(self) -> str:
        job = self.provider.job(self.node_id)
        return f"{job.host if job else 'a node that has ended'} (Slurm job {self.node_id})"


@contextmanager
def _piped(words: list[str]) -> Iterator[Any]:
    """What a command prints; raises ClickException if it fails."""
    with subprocess.Popen(words, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        yield process.stdout
    if process.returncode:
        raise click.ClickException(f"{shlex.join(words[:3])} ... ended with exit code {process.returncode}")
