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
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND

from cluster.providers._node import Commands, File, Kind, Nodes

# Slurm kills what a step leaves behind, so a daemon must be a child of the batch step, which takes commands by a pipe.
HOLDER = r"""#!/bin/bash
d=/tmp/ray-slurm-$SLURM_JOB_ID; rm -rf "$d"; mkdir -m 700 "$d"; mkfifo "$d/in" "$d/out"
trap 'rm -rf "$d"' EXIT
if [ -n "$HEAD" ]; then  # a worker goes when its head has gone, not when Slurm does not answer
  while sleep 30; do
    jobs=$(squeue --me -h -n "$SLURM_JOB_NAME" -o %A) && ! grep -qx "$HEAD" <<<"$jobs" && scancel "$SLURM_JOB_ID"
  done &
fi
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
ROOT = str(Path(__file__).resolve().parent.parent.parent)
ALIVE = "PENDING,CONFIGURING,RUNNING,SUSPENDED"
COMMENT = 1024  # bytes that Slurm keeps
PORTS = 20000, 1000, 10  # the first port, how many clusters on a host, ports for each


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


class SlurmNodeProvider(Nodes):
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

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        head = tags.get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD
        old = self.non_terminated_nodes({} if head else {TAG_RAY_NODE_KIND: NODE_KIND_HEAD})
        if head:  # what is left of a cluster whose head was lost knows nothing of this one
            self.terminate_nodes(old)
        holder = HOLDER.replace("$HEAD", "" if head else old[0] if old else "")
        name = [
            "--parsable",
            f"--job-name={self._name}",
            "--output=/dev/null",
            "--no-requeue",
            f"--comment={said(tags)}",
        ]
        made: dict[str, Any] = {}
        for _ in range(count):
            told = slurm("sbatch", *name, *node_config.get("sbatch", []), text=holder)
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

    @property
    def root(self) -> str:
        """Of this clone, which all nodes see."""
        return ROOT

    def waits_for(self, node_id: str) -> str | None:
        job = self.job(node_id)
        if job is None:
            raise click.ClickException(f"Slurm job {node_id} has ended: see `sacct -j {node_id}`")
        return None if job.state == "RUNNING" else job.reason

    def port(self) -> int:
        """By the id of the head's job; raises RuntimeError if there is none."""
        first, clusters, each = PORTS
        return first + int(self.head()) % clusters * each

    def commands(self, node_id: str) -> "SrunCommands":
        return SrunCommands(self, node_id)

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


class SrunCommands(Commands):
    """Commands on a node by srun, daemons by the batch step of its job."""

    how_to_forward = "nothing: the login node reaches compute nodes by their names"

    def execute(self, script: str, source: File = None, sink: File = None, kind: Kind = "command") -> int:
        if kind == "daemon":
            with tempfile.TemporaryFile() as told:
                told.write(script.encode())
                told.seek(0)
                return self._srun("bash", "-c", IN_HOLDER, stdin=told, stdout=sink)
        if source or sink or not (sys.stdin and sys.stdin.isatty()):
            return self._srun("bash", "-c", script, stdin=source or subprocess.DEVNULL, stdout=sink)
        return self._srun("--pty", "bash", "-c", script)

    def place(self) -> str:
        job = self.provider.job(self.node_id)
        return f"{job.host} (Slurm job {self.node_id})" if job and job.host else f"Slurm job {self.node_id}"

    def remote_shell_command_str(self) -> str:
        return shlex.join(self._words("--pty", "bash"))

    def _words(self, *words: str) -> list[str]:
        # -X: Ctrl-C goes to the command at once.
        return ["srun", f"--jobid={self.node_id}", "--overlap", "--nodes=1", "--ntasks=1", "--quiet", "-X", *words]

    def _srun(self, *words: str, **options: Any) -> int:
        """The exit code of a command, also of one that Ctrl-C has told to end: it may have something to save."""
        with subprocess.Popen(self._words(*words), env=environment(), **options) as process:
            try:
                return process.wait()
            except KeyboardInterrupt:
                return process.wait()
