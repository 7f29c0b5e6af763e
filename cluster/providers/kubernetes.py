"""Ray's cluster launcher on Kubernetes, without an operator and without SSH: `ray up|submit|exec|... kubernetes.yaml`.

A node is a Pod, its id the Pod's name, its tags the Pod's labels; commands go through exec. Workers belong to the head:
when its Pod goes, the cluster removes theirs. In the yaml:

    provider:
      type: external
      module: cluster.providers.kubernetes.KubernetesNodeProvider
      namespace: default
      context: my-cluster          # of the kubeconfig, if not the current one
      root: ~/ncsn                 # where commands run
      prolog: export A=B           # before every command
      results: {repro.py: [out]}   # what comes back after that script, from below root
    available_node_types:
      cpu:
        node_config: {spec: {containers: [...]}}  # a Pod; the first container must keep running

Ray's processes in a Pod find the API by its service account.
"""

import copy
import os
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import click
from kubernetes import client, config
from kubernetes.stream import stream
from kubernetes.stream.ws_client import ERROR_CHANNEL
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND
from urllib3.exceptions import HTTPError
from websocket import WebSocketException

from cluster.providers._node import Commands, File, Kind, Nodes

CLUSTER = "ray-cluster-name"
PORT = 6379
COMMIT = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
CHUNK = 1 << 16
PING = 20.0  # seconds between signs of life, without which what lies between ends a connection
AGAIN = 2.0, 600.0  # seconds between tries to follow a command again, and for how long
LOST = (OSError, WebSocketException, HTTPError, client.ApiException)  # what a broken connection raises
# A command outlives the connection by which it was begun, so that it can be followed by another one.
BEGIN = """mkdir {folder} && cd {folder} && cat >script <<'end of {folder}'
{script}
end of {folder}
cat >run <<'end of {folder}'
echo $$ >pid
trap : INT  # the command's to answer
bash script >log 2>&1 </dev/null
echo $? >code.part; mv code.part code
end of {folder}
: >log; setsid --fork bash run >/dev/null 2>&1 </dev/null; until [ -s pid ]; do sleep 0.05; done
"""
FOLLOW = "cd {folder} && tail -c +{after} --pid=$(cat pid) -s 0.2 -f log"
CODE = "cd {folder} && code=$(cat code || echo 137); rm -r {folder}; exit $code"
INTERRUPT = "kill -INT -- -$(cat {folder}/pid)"


class KubernetesNodeProvider(Nodes):
    """Nodes are Pods with the label ray-cluster-name."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self.namespace: str = provider_config.get("namespace", "default")
        try:
            config.load_incluster_config()
        except config.ConfigException:
            try:
                config.load_kube_config(os.environ.get("KUBECONFIG"), provider_config.get("context"))
            except config.ConfigException as error:
                raise click.ClickException(f"no Kubernetes cluster: {error}; expected one in KUBECONFIG") from error

    @property
    def api(self) -> client.CoreV1Api:
        """One for each call: stream() patches the client that it is given, and there are threads."""
        return client.CoreV1Api(client.ApiClient())

    @property
    def root(self) -> str:
        return str(self.provider_config.get("root", "~/ncsn"))

    def port(self) -> int:
        """Of each Pod, which has an address of its own."""
        return PORT

    def environment(self) -> dict[str, str]:
        """The commit of this clone: on the nodes there is no git repository."""
        told = subprocess.run(COMMIT, capture_output=True, text=True, check=False) if shutil.which("git") else None
        commit = told.stdout.strip() if told else ""
        return {"NCSN_COMMIT": commit} if commit else {}

    def pod(self, node_id: str) -> client.V1Pod | None:
        """None if it has ended."""
        try:
            pod = self.api.read_namespaced_pod(node_id, self.namespace)
        except client.ApiException as error:
            if error.status == 404:
                return None
            raise
        return pod if _alive(pod) else None

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        return [pod.metadata.name for pod in self._pods(tag_filters)]

    def is_running(self, node_id: str) -> bool:
        pod = self.pod(node_id)
        return pod is not None and pod.status.phase == "Running"

    def is_terminated(self, node_id: str) -> bool:
        return self.pod(node_id) is None

    def node_tags(self, node_id: str) -> dict[str, str]:
        pod = self.pod(node_id)
        return {key: value for key, value in (pod.metadata.labels if pod else {}).items() if key != CLUSTER}

    def internal_ip(self, node_id: str) -> str | None:
        pod = self.pod(node_id)
        return pod.status.pod_ip if pod else None

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        pod = copy.deepcopy(node_config)
        pod.setdefault("spec", {}).setdefault("restartPolicy", "Never")
        about = pod.setdefault("metadata", {})
        about["generateName"] = f"ray-{self.cluster_name}-{tags.get(TAG_RAY_NODE_KIND, 'node')}-"
        about["labels"] = {**about.get("labels", {}), CLUSTER: self.cluster_name, **tags}
        if tags.get(TAG_RAY_NODE_KIND) != NODE_KIND_HEAD:
            about["ownerReferences"] = [
                {"apiVersion": "v1", "kind": "Pod", "name": head.metadata.name, "uid": head.metadata.uid}
                for head in self._pods({TAG_RAY_NODE_KIND: NODE_KIND_HEAD})
            ]
        return {self.api.create_namespaced_pod(self.namespace, pod).metadata.name: {} for _ in range(count)}

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        self.api.patch_namespaced_pod(node_id, self.namespace, {"metadata": {"labels": tags}})

    def terminate_node(self, node_id: str) -> None:
        try:
            self.api.delete_namespaced_pod(node_id, self.namespace)
        except client.ApiException as error:
            if error.status != 404:
                raise

    def waits_for(self, node_id: str) -> str | None:
        pod = self.pod(node_id)
        if pod is None:
            raise click.ClickException(f"Pod {node_id} has ended: see `kubectl describe pod {node_id}`")
        return None if pod.status.phase == "Running" else _reason(pod)

    def commands(self, node_id: str) -> "ExecCommands":
        return ExecCommands(self, node_id)

    def _pods(self, tags: Mapping[str, str]) -> list[client.V1Pod]:
        selector = ",".join(f"{key}={value}" for key, value in {CLUSTER: self.cluster_name, **tags}.items())
        return [
            pod for pod in self.api.list_namespaced_pod(self.namespace, label_selector=selector).items if _alive(pod)
        ]


def _alive(pod: client.V1Pod) -> bool:
    return pod.status.phase in ("Pending", "Running") and not pod.metadata.deletion_timestamp


def _reason(pod: client.V1Pod) -> str:
    """Why a Pod does not run yet: an image that cannot be had, or no node with room."""
    for box in pod.status.container_statuses or []:
        if box.state and box.state.waiting and box.state.waiting.reason:
            return ": ".join(filter(None, (box.state.waiting.reason, box.state.waiting.message)))
    for condition in pod.status.conditions or []:
        if condition.status == "False" and condition.reason:
            return ": ".join(filter(None, (condition.reason, condition.message)))
    return str(pod.status.phase)


class ExecCommands(Commands):
    """Commands in a Pod by exec."""

    how_to_forward = "kubectl port-forward"
    provider: KubernetesNodeProvider

    def execute(self, script: str, source: File = None, sink: File = None, kind: Kind = "command") -> int:
        if kind == "shell" and sys.stdin and sys.stdin.isatty():
            return subprocess.run([*self._kubectl(), "bash", "-c", script], check=False).returncode
        if source or sink or kind != "command":
            return self._exec(script, source, sink)
        return self._followed(script)

    def place(self) -> str:
        return f"Pod {self.node_id}"

    def remote_shell_command_str(self) -> str:
        return shlex.join([*self._kubectl(), "bash"])

    def _kubectl(self) -> list[str]:
        return ["kubectl", "exec", "-it", f"--namespace={self.provider.namespace}", self.node_id, "--"]

    def _exec(
        self,
        script: str,
        source: File = None,
        sink: File = None,
        heard: Callable[[int], None] = lambda size: None,
    ) -> int:
        """The exit code of a script, while the connection lasts; raises ConnectionError if that breaks.

        What it prints goes to `sink`, or here; `heard` is told how many bytes it was.
        """
        call = stream(
            self.provider.api.connect_get_namespaced_pod_exec,
            self.node_id,
            self.provider.namespace,
            command=["bash", "-c", script],
            stdin=source is not None,
            stdout=True,
            stderr=True,
            tty=False,
            binary=True,
            _preload_content=False,
        )

        def pass_on() -> None:
            if some := call.read_stdout(0):
                (sink or sys.stdout.buffer).write(some)
                sys.stdout.flush()
                heard(len(some))
            if some := call.read_stderr(0):
                sys.stderr.write(some.decode(errors="replace"))

        try:
            while source and (some := source.read(CHUNK)):
                call.write_stdin(some)
            last = time.monotonic()
            while call.is_open():
                call.update(timeout=1)
                pass_on()
                if time.monotonic() - last > PING:
                    call.sock.ping()
                    last = time.monotonic()
            pass_on()  # to look for one stream's pieces takes in the other's, perhaps with the end of the connection
            if not call.peek_channel(ERROR_CHANNEL):
                raise ConnectionError(f"the connection to {self.place()} is lost")
            return int(call.returncode)
        finally:
            call.close()

    def _followed(self, script: str) -> int:
        """The exit code of a script that lives on when the connection is lost; Ctrl-C tells it to end."""
        folder, after, interrupted, lost = f"/tmp/exec-{uuid.uuid4().hex}", 1, False, 0.0

        def heard(size: int) -> None:
            nonlocal after, lost
            after, lost = after + size, 0.0

        self._exec(BEGIN.format(folder=folder, script=script))
        while True:
            try:
                self._exec(FOLLOW.format(folder=folder, after=after), heard=heard)
                return self._exec(CODE.format(folder=folder))
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                click.echo(f"Ctrl-C goes to the command on {self.place()}; again to leave it")
                self._exec(INTERRUPT.format(folder=folder))
            except LOST as error:
                lost = lost or time.monotonic()
                if self._ended():
                    raise click.ClickException(f"{self.place()} has ended while a command ran on it") from error
                if time.monotonic() - lost > AGAIN[1]:
                    raise click.ClickException(
                        f"{self.place()} cannot be reached; the command goes on there"
                    ) from error
                time.sleep(AGAIN[0])

    def _ended(self) -> bool:
        """Whether it is known that the Pod has ended."""
        try:
            return self.provider.is_terminated(self.node_id)
        except LOST:
            return False
