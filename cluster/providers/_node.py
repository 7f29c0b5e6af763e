"""What the launchers have in common: Ray's commands and copies, over shell scripts that run on a node."""

import fnmatch
import json
import os
import secrets
import shlex
import sys
import tarfile
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import click
from ray.autoscaler.command_runner import CommandRunnerInterface
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND

BOOTSTRAP = "~/ray_bootstrap_config.yaml"  # Ray's, one a home: clusters that share a home would share it
TOKEN = Path("~/.ray/auth_token")
File = BinaryIO | None
Kind = Literal["command", "daemon", "shell"]
POLL, SIGN_OF_LIFE = 1.0, 30.0  # seconds


class Nodes(NodeProvider, ABC):  # type: ignore[misc]
    """A provider of nodes; every user has one token, by which Ray's processes know each other."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        if not TOKEN.expanduser().is_file():
            _make_token(TOKEN.expanduser())

    @property
    @abstractmethod
    def root(self) -> str:
        """The folder on the nodes where commands run."""

    @abstractmethod
    def port(self) -> int:
        """The first of the cluster's ports on its head."""

    @abstractmethod
    def waits_for(self, node_id: str) -> str | None:
        """What keeps a node from running; None if it runs. Raises ClickException if it has ended."""

    @abstractmethod
    def commands(self, node_id: str) -> "Commands":
        """Commands on a node."""

    def head(self) -> str:
        """The head's node; raises RuntimeError if there is none."""
        heads = self.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_HEAD})
        if not heads:
            raise RuntimeError(f"the cluster {self.cluster_name} has no head: it has ended")
        return str(heads[0])

    def address(self) -> str:
        """Of Ray's head; raises RuntimeError if there is none."""
        return f"{self.internal_ip(self.head())}:{self.port()}"

    def external_ip(self, node_id: str) -> str | None:
        return self.internal_ip(node_id)

    def environment(self) -> dict[str, str]:
        """What commands see besides."""
        return {}

    def get_command_runner(
        self,
        log_prefix: str,
        node_id: str,
        auth_config: dict[str, Any],
        cluster_name: str,
        process_runner: Any,
        use_internal_ip: bool,
        docker_config: dict[str, Any] | None = None,
    ) -> "Commands":
        if docker_config and docker_config.get("container_name"):
            raise click.ClickException("no docker section here: name a container in node_config, if at all")
        return self.commands(node_id)


class Commands(CommandRunnerInterface, ABC):  # type: ignore[misc]
    """Commands on one node, and copies to and from it."""

    how_to_forward: str

    def __init__(self, provider: Nodes, node_id: str) -> None:
        self.provider, self.node_id = provider, node_id

    @abstractmethod
    def execute(self, script: str, source: File = None, sink: File = None, kind: Kind = "command") -> int:
        """Run a bash script on the node that runs, to its end.

        Args:
            source: A file that it reads; it has to know how long it is.
            sink: A file for what it prints; else that is printed here.
            kind: A "daemon" leaves processes behind that are to live on; in a "shell" somebody will type.

        Returns:
            Its exit code.
        """

    @abstractmethod
    def place(self) -> str:
        """The node, in messages."""

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
        """Run a command, as soon as the node runs; the exit code of the program is then the command's."""
        if port_forward:
            raise click.ClickException(f"no port forwarding from here: expected {self.how_to_forward}")
        self._wait()
        # `ray stop`, which `ray down` sends before it ends the node, would end all Ray processes of a host, those of
        # another cluster, too. --stop appends it, a "ray teardown" that there is no more, and a shutdown.
        cmd, off, _ = (cmd or "$SHELL").replace("ray teardown ", "ray down ").partition("; sudo shutdown -h now")
        cmd = cmd.replace("; ray stop; ", "; ")
        if cmd == "ray stop":
            return ""
        script = self._script(cmd, environment_variables or {})
        with tempfile.TemporaryFile() as printed:
            sink = printed if with_output else None
            kind: Kind = "daemon" if "ray start" in cmd else "shell" if cmd == "$SHELL" else "command"
            code = self.execute(script, sink=sink, kind=kind)
            printed.seek(0)
            output = printed.read().decode(errors="replace")
        self._bring(cmd)
        if off or shutdown_after_run:
            self.provider.terminate_node(self.node_id)
        if code:
            error = click.ClickException(f"exit code {code} on {self.place()}: {cmd}")
            error.exit_code = code  # type: ignore[misc]  # that of `ray submit`, too
            raise error
        return output

    def run_rsync_up(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        """Copy a file or a folder to the node."""
        self._wait()
        there = f'there="{self._path(target)}"'
        with tempfile.TemporaryFile() as packed:
            if Path(source).is_dir():
                pack(Path(source), packed, (options or {}).get("rsync_exclude") or [])
                take = f'mkdir -p "$there" && head -c {packed.tell()} | tar -x --no-same-owner -C "$there"'
            else:
                packed.write(Path(source).read_bytes())
                mode = Path(source).stat().st_mode & 0o777
                take = (
                    f'[ ! -d "$there" ] || there="$there"/{shlex.quote(Path(source).name)}\n'
                    f'part="$there.part"; mkdir -p "$(dirname "$there")" && head -c {packed.tell()} >"$part" && '
                    f'[ "$(wc -c <"$part")" = {packed.tell()} ] && chmod {mode:o} "$part" && mv "$part" "$there"'
                )
            packed.seek(0)
            self._copied(self.execute(f"set -o pipefail; {there}; {take}", source=packed))

    def run_rsync_down(self, source: str, target: str, options: dict[str, Any] | None = None) -> None:
        """Copy a file or a folder from the node."""
        self._wait()
        there, here = self._path(source.rstrip("/")), Path(target)
        with tempfile.TemporaryFile() as packed:
            if self.execute(f'[ -d "{there}" ]') == 0:
                self._copied(self.execute(f'tar -C "{there}" -c .', sink=packed))
                here.mkdir(parents=True, exist_ok=True)
                packed.seek(0)
                with tarfile.open(fileobj=packed) as tar:
                    tar.extractall(here, filter="data")
                return
            self._copied(self.execute(f'cat "{there}"', sink=packed))
            if here.is_dir():
                here /= Path(source).name
            here.parent.mkdir(parents=True, exist_ok=True)
            packed.seek(0)
            part = here.with_name(f".{here.name}.part")
            part.write_bytes(packed.read())
            part.replace(here)

    def _bring(self, cmd: str) -> None:
        """After the script that provider.results names, copy here what it left there, whether it failed or not."""
        results: Mapping[str, Sequence[str]] = self.provider.provider_config.get("results") or {}
        for path in next((paths for script, paths in results.items() if f"/{script}" in cmd), ()):
            if self.execute(f'[ -e "{self._path(self.provider.root)}/{path}" ]') == 0:
                self.run_rsync_down(f"{self.provider.root}/{path}", path)
                click.echo(f"brought back {path}")

    def _wait(self) -> None:
        """Wait until the node runs, however long the queue is; say so."""
        since, said = time.monotonic(), -SIGN_OF_LIFE
        while reason := self.provider.waits_for(self.node_id):
            waited = time.monotonic() - since
            if waited - said >= SIGN_OF_LIFE:
                click.echo(f"{self.place()} waits in the queue ({reason}), {waited:.0f} s")
                sys.stdout.flush()
                said = waited
            time.sleep(POLL)

    def _script(self, cmd: str, variables: Mapping[str, object]) -> str:
        root = self._path(self.provider.root)
        own = {"CLUSTER_PORT": str(self.provider.port()), **self.provider.environment()}
        if "ray start" not in cmd:
            own["RAY_ADDRESS"] = self.provider.address()
        lines = [f'export CLUSTER_ROOT="{root}"; mkdir -p "$CLUSTER_ROOT"; cd "$CLUSTER_ROOT"']
        lines.append(self.provider.provider_config.get("prolog", ":"))
        for key, value in {**own, **variables}.items():
            lines.append(f"export {key}={shlex.quote(value if isinstance(value, str) else json.dumps(value))}")
        return "\n".join([*lines, cmd.replace(BOOTSTRAP, self._bootstrap)])

    @property
    def _bootstrap(self) -> str:
        return f"~/.ray-{self.provider.cluster_name}.yaml"

    def _path(self, path: str) -> str:
        path = path.replace(BOOTSTRAP, self._bootstrap)
        return path.replace("~", "$HOME", 1) if path.startswith("~") else path

    def _copied(self, code: int) -> None:
        if code:
            raise click.ClickException(f"copying to or from {self.place()} failed: exit code {code}")


def pack(folder: Path, file: BinaryIO, leave: Sequence[str] = ()) -> None:
    """Write what a folder holds as a tar, without files and folders of some names, in which * stands for anything."""

    def kept(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = Path(info.name).name
        return None if any(fnmatch.fnmatch(name, each.rstrip("/")) for each in leave) else info

    with tarfile.open(fileobj=file, mode="w") as tar:
        tar.add(folder, arcname=".", filter=kept)


def _make_token(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.touch(mode=0o600)
    part.write_text(secrets.token_hex(16))
    part.replace(path)
