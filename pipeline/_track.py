"""The MLflow run that the stages of one `dvc repro` share; the only importer of mlflow.

A stage joins the newest unfinished run with the same parameters and code, or starts one; the report ends it. So a
repeated `dvc repro` after a crash goes on in the same run, and other parameters make another run to compare with.

What is logged is first written to a folder in runs/tracking, which takes no time worth speaking of, and sent from there
by a thread. So a tracking server that is away, even from the start, stops nothing and loses nothing: what it could not
get is tried again every ten seconds, at the end of the stage, and by the next stage that reaches it. All that is sent
may be sent twice without being there twice.
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline import _params
from pipeline._stage import StageError, log
from pipeline._store import code_digest, fingerprint, read_json, replacing_folder, write_json, write_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

RESULT_SECTIONS = [field.name for field in dataclasses.fields(_params.Params) if field.name != "runtime"]
KEY = "ncsn.fingerprint"
WEIGHTS = "ncsn.weights"
REASON = "ncsn.reason"  # why a run has failed or was stopped
SPOOL = Path("runs/tracking")
AGAIN = 10.0  # seconds until a server that was away is tried again
SHORT = 20.0  # seconds within which a stage may end that leaves what it logs to the next one
START = "START"  # in a picture's name, where it is sent, the run's start
QUICK = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}


@dataclass(frozen=True)
class Run:
    """A run: what is logged goes to its folder at once, and to the tracking store soon. A plain value.

    `start` is when the run began, in ms since 1970; 0 as long as a stage may be a short one, to be sent later.
    """

    uri: str
    folder: str
    start: int = 0

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters, nested ones as section.key; a parameter keeps its first value for good."""
        self._note("params", [[key, str(value)] for key, value in flatten(values)])

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._note("tags", [[key, value] for key, value in values.items()])

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at one step."""
        self.history([(step, values)])

    def history(self, rows: list[tuple[int, Mapping[str, float]]], missing: bool = False) -> None:
        """Log numbers at many steps; if `missing`, only those at steps which the run does not have."""
        now = _now()
        flat = [[key, float(value), now, int(step)] for step, values in rows for key, value in values.items()]
        self._note("missing" if missing else "metrics", flat)

    def image(self, pixels: np.ndarray, key: str, step: int) -> None:
        """Log a uint8 picture (H, W) or (H, W, 3) under a key with a step, which makes a slider in the UI.

        One of the same key and step takes the place of an earlier one.
        """
        picture = Image.fromarray(pixels)
        # The UI reads these names. Time and id are functions of run and step, so that logging again replaces.
        same = uuid.uuid5(uuid.NAMESPACE_OID, f"{key} {step}")
        name = f"{key.replace('/', '~')}+step+{step}+timestamp+{START}+{same}"
        with self._files() as files:
            (files / "images").mkdir()
            picture.save(files / "images" / f"{name}.png")
            picture.thumbnail((256, 256))
            picture.save(files / "images" / f"{name}+compressed.webp")
        self.tags({"mlflow.loggedImages": "True"})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file, or a folder's files, as they are now."""
        with self._files() as files:
            if path.is_dir():
                shutil.copytree(path, files / (folder or path.name))
            else:
                (files / (folder or "")).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, files / (folder or "") / path.name)

    def tables(self, *paths: str) -> None:
        """Let the UI show artifacts, JSON with "columns" and "data", as tables that can be compared between runs."""
        self.tags({"mlflow.loggedArtifacts": json.dumps([{"path": path, "type": "table"} for path in paths])})

    def trained(self, weights: str) -> None:
        """Say which weights the run is of, by their hash, for what is done `afterwards` with them."""
        self.tags({WEIGHTS: weights})

    @property
    def id(self) -> str | None:
        """Of MLflow's; None as long as no server has answered."""
        found: str | None = read_json(Path(self.folder, "run.json")).get("id")
        return found

    def finish(self) -> None:
        """Mark the run as complete; a later stage starts another one."""
        self._note("status", [["FINISHED", _now()]])
        Path(self.folder, "finished").touch()

    @contextmanager
    def system_metrics(self, interval: float = 10.0) -> Iterator[None]:
        """Log this machine's CPU, memory, disk, network and NVIDIA GPUs every `interval` seconds in the body.

        The steps are seconds since the run began, so that they go on when the run does.
        """
        ended = threading.Event()

        def watch() -> None:
            monitors = _monitors()
            while not ended.wait(interval):
                for monitor in monitors:
                    monitor.collect_metrics()
                    values = {f"system/{key}": value for key, value in monitor.aggregate_metrics().items()}
                    monitor.clear_metrics()
                    self.metrics(values, (_now() - self.start) // 1000)

        thread = threading.Thread(target=watch, name="system metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _note(self, kind: str, entries: list[list[Any]]) -> None:
        folder = Path(self.folder)
        with _locked(folder / "notes.lock"), open(folder / "waiting.jsonl", "a") as file:
            file.write(json.dumps([kind, entries]) + "\n")

    @contextmanager
    def _files(self) -> Iterator[Path]:
        with replacing_folder(Path(self.folder, "files", f"{time.time_ns()}")) as files:
            yield files


@contextmanager
def run(
    params: _params.Params, *, later: bool = False, afterwards: str | None = None, sweep: str | None = None
) -> Iterator[Run]:
    """Join or start the run of these parameters and this code; it is marked FAILED or KILLED if the body raises.

    Args:
        params: Of the stage.
        later: If the body takes less than SHORT seconds and does not raise, leave what is logged for the next stage to
            send: MLflow alone takes two to be imported.
        afterwards: The hash of weights: join the newest run that they were `trained` in, whether or not it has ended,
            and leave its status as it is.
        sweep: A name, for a run of its own that has the trials of this sweep below it.

    Raises:
        StageError: If the tracking store refuses us, or is a local one that cannot be used. A server that does not
            answer is only warned about.
    """
    courier = _Courier(params, afterwards, sweep)
    current = courier.begin(later)
    failed = True
    try:
        yield current
        failed = False
    except BaseException as error:
        if afterwards is None:
            current.tags({REASON: _line(error)})
            current._note("status", [["FAILED" if isinstance(error, Exception) else "KILLED", _now()]])
        raise
    finally:
        courier.close(failed=failed)


class _Courier(threading.Thread):
    """Sends what waits in a run's folder, and once what earlier runs have left behind, until it is closed."""

    def __init__(self, params: _params.Params, afterwards: str | None, sweep: str | None) -> None:
        super().__init__(name="tracking", daemon=True)
        self.uri = tracking_uri(params)
        self.params, self.about = params, _about(self.uri, params, afterwards, sweep)
        name = fingerprint([self.about[key] for key in ("uri", "experiment", "key", "afterwards")])
        self.earlier = _folders(SPOOL.resolve(), f"{name}-*")
        # A stage goes on in the folder of the last one if that still has something to say about the same run.
        last = self.earlier[-1] if self.earlier else None
        goes_on = last is not None and _waits(last) and not (last / "finished").exists()
        lock = _claim(last) if last is not None and goes_on else None
        self.own = self.earlier.pop() if lock else SPOOL.resolve() / f"{name}-{time.time_ns()}"
        self.lock = lock or _make(self.own)
        self.closing = threading.Event()
        self.short, self.away, self.tidy = False, False, False

    def begin(self, later: bool) -> Run:
        """Note that the run has begun; find or start it and send from now on, or, if this is for later, from SHORT on.
        Raises StageError if it cannot be, unless the reason may pass."""
        if not (self.own / "run.json").exists():
            write_json(self.own / "run.json", self.about)
        current = Run(self.uri, str(self.own))
        if self.about["afterwards"] is None:
            current._note("status", [["RUNNING", _now()]])
            current.params(_params.as_dict(self.params, *RESULT_SECTIONS))
        else:
            current.trained(self.about["afterwards"])
        if later:
            self.short = True
            self.start()
            return current
        try:
            self._send_left(self.earlier)  # first, as this may be what ends an earlier run
            _send(self.own)
        except Exception as error:
            if not (self.uri.startswith("http") and _may_pass(error)):
                fix = "set MLFLOW_TRACKING_URI or runtime.tracking_uri"
                raise StageError(f"MLflow at {_shown(self.uri)}: {_line(error)}: {fix}") from error
            self._missed(error)
        self.start()
        return dataclasses.replace(current, start=read_json(self.own / "run.json")["start"])

    def run(self) -> None:
        if self.short and self.closing.wait(SHORT):
            return
        self.short = False
        while not self.closing.wait(AGAIN if self.away else 1.0):
            self._round()
        self._round()

    def close(self, *, failed: bool) -> None:
        """Send what is left, and tell if that cannot be; after a short stage that did not fail leave it for later."""
        self.closing.set()
        self.join()
        if self.short and failed:
            self._round()
        if not self.short or failed:
            if waits := _waits(self.own):
                log.warning("%s for MLflow in %s, for the next stage to send", waits, os.path.relpath(self.own))
            else:
                _remove(self.own)
        self.lock.close()

    def _round(self) -> None:
        try:
            _send(self.own)
            if not self.tidy:
                self._send_left(_folders(self.own.parent))
                self.tidy = True
        except Exception as error:  # told, and what was to be sent stays
            self._missed(error)
        else:
            if self.away:
                log.info("MLflow at %s answers again", _shown(self.uri))
            self.away = False

    def _send_left(self, folders: list[Path]) -> None:
        """Send what waits in folders of which no process takes care, and remove them."""
        for folder in folders:
            if folder != self.own and (lock := _claim(folder)):
                with lock:
                    about = folder / "run.json"
                    if not about.exists() or read_json(about)["uri"] == self.uri:
                        _send(folder)
                        _remove(folder)

    def _missed(self, error: Exception) -> None:
        if not self.away:
            where = os.path.relpath(self.own)
            log.warning("MLflow at %s: %s; what is logged waits in %s", _shown(self.uri), _line(error), where)
        self.away = True


def tracking_uri(params: _params.Params) -> str:
    """Where MLflow is: as $MLFLOW_TRACKING_URI or else the parameters say."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _absolute(params.runtime.tracking_uri)


def read_artifact(uri: str, run: str, path: str) -> tuple[str, bytes]:
    """What a run is called, its name and the beginning of its id, and the content of one of its artifacts.

    Args:
        uri: Of the tracking store.
        run: Id, beginning of an id, or name.
        path: Within the run's artifacts.

    Raises:
        StageError: If there is no such run, more than one, no such artifact, or no answer.
    """
    where, database = f"MLflow at {_shown(uri)}", uri.partition("?")[0].removeprefix("sqlite:///")
    if uri.startswith("sqlite:") and not Path(database).is_file():  # MLflow would make an empty one
        raise StageError(f"{run} is no file and no folder, and there is no {where} to have such a run")
    try:
        client = _client(uri)
        runs = _named(client, run)
        if not runs:
            raise StageError(f"{run} is no file, no folder and no run of {where}: expected one of these")
        if len(runs) > 1:
            ids = " or ".join(sorted(runs))
            raise StageError(f"{run} is {len(runs)} runs of {where}: expected the id of one, {ids}")
        ((run_id, name),) = runs.items()
        label = f"{name} {run_id[:8]}"
        if path not in [each.path for each in client.list_artifacts(run_id, str(Path(path).parent))]:
            fix = "go on with it by `dvc repro` where it was begun, or name another"
            raise StageError(f"run {label} of {where} has no {path}, it was never evaluated: {fix}")
        with tempfile.TemporaryDirectory() as folder:
            return label, Path(client.download_artifacts(run_id, path, folder)).read_bytes()
    except StageError:
        raise
    except Exception as error:  # MLflow's, or that of a client below it
        fix = "set --tracking-uri, MLFLOW_TRACKING_URI or runtime.tracking_uri"
        raise StageError(f"{where}: {_line(error)}: {fix}") from error


def probe(params: _params.Params) -> str:
    """Make a run in the experiment, write to it, read that back and delete it.

    Returns:
        Where MLflow is.

    Raises:
        StageError: If there is no answer, or another one than was written.
    """
    uri = tracking_uri(params)
    about = _about(uri, params, None, "doctor") | {"name": "doctor"}
    try:
        client = _client(uri)
        run_id, _ = _create(client, about)
        try:
            client.log_metric(run_id, "probe", 1.0)
            client.log_text(run_id, "probe", "probe.txt")
            with tempfile.TemporaryDirectory() as folder:
                text = Path(client.download_artifacts(run_id, "probe.txt", folder)).read_text()
            found = client.get_run(run_id).data.metrics.get("probe"), text
        finally:
            client.delete_run(run_id)
    except Exception as error:  # MLflow's, or that of a client below it
        fix = "is it up? set MLFLOW_TRACKING_URI or runtime.tracking_uri"
        raise StageError(f"MLflow at {_shown(uri)}: {_line(error)}: {fix}") from error
    if found != (1.0, "probe"):
        raise StageError(f"MLflow at {_shown(uri)}: what was written is not what is read: set MLFLOW_TRACKING_URI")
    return _shown(uri)


def revision() -> str | None:
    """The git commit of the working directory, with "-dirty" if tracked files differ; outside git NCSN_COMMIT."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(FileNotFoundError):
        if found := subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip():
            return found
    return os.environ.get("NCSN_COMMIT") or None


def _about(uri: str, params: _params.Params, afterwards: str | None, sweep: str | None) -> dict[str, Any]:
    """What it takes to find or to start the run, as JSON."""
    parent = params.runtime.parent_run
    key = fingerprint([_params.result(params, *RESULT_SECTIONS), code_digest("ncsn", "pipeline"), parent, sweep])
    tags = {KEY: key, "mlflow.source.name": "dvc repro", "runtime.workers": str(params.runtime.workers)}
    if commit := revision():
        tags["mlflow.source.git.commit"] = commit
    if parent is not None:
        tags["mlflow.parentRunId"] = parent
    if name := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = name
    # A database beside the project keeps its artifacts in the storage or beside it; a server says itself where they go.
    storage = params.runtime.storage
    beside = f"{storage.rstrip('/')}/mlflow" if storage.startswith("s3://") else (Path.cwd() / "mlartifacts").as_uri()
    return {
        "uri": uri,
        "experiment": params.runtime.experiment,
        "artifacts": beside if uri.startswith("sqlite:") else None,
        "key": key,
        "afterwards": afterwards,
        "name": "-".join(filter(None, [params.data.name, params.model.name, sweep, key[:6]])),
        "tags": tags,
        "start": _now(),
    }


def _find(client: MlflowClient, about: Mapping[str, Any]) -> tuple[str, int] | None:
    """Id and start of the newest unfinished run of this key; afterwards of the newest one of the weights."""
    experiment = client.get_experiment_by_name(about["experiment"])
    if experiment is None:
        return None
    query = f"tags.`{KEY}` = '{about['key']}' and attributes.status != 'FINISHED'"
    if about.get("afterwards") is not None:
        query = f"tags.`{WEIGHTS}` = '{about['afterwards']}'"
    found = client.search_runs([experiment.experiment_id], query, max_results=1, order_by=["start_time DESC"])
    return (found[0].info.run_id, found[0].info.start_time) if found else None


def _named(client: MlflowClient, run: str) -> dict[str, str]:
    """Id and name of all runs with this name, id, or beginning of an id, in any experiment."""
    everywhere = [each.experiment_id for each in client.search_experiments()]
    queries = []
    if not {"'", "\\"} & set(run):
        queries.append(f"attributes.run_name = '{run}'")
    if re.fullmatch("[0-9a-f]{1,32}", run):
        queries.append(f"attributes.run_id LIKE '{run}%'")
    found = [each.info for query in queries for each in client.search_runs(everywhere, query)]
    return {info.run_id: info.run_name for info in found}


def _create(client: MlflowClient, about: Mapping[str, Any]) -> tuple[str, int]:
    experiment = client.get_experiment_by_name(about["experiment"])
    if experiment is not None:
        experiment_id = experiment.experiment_id
    else:
        experiment_id = client.create_experiment(about["experiment"], artifact_location=about["artifacts"])
    new = client.create_run(experiment_id, start_time=about["start"], tags=about["tags"], run_name=about["name"])
    log.info("MLflow run %s (%s)", about["name"], new.info.run_id)
    return new.info.run_id, about["start"]


def _send(folder: Path) -> None:
    """Send what waits in a run's folder, which is ours."""
    if not _waits(folder):
        return
    about = read_json(folder / "run.json")
    client = _client(about["uri"])
    if "id" not in about:
        about["id"], about["start"] = _find(client, about) or _create(client, about)
        write_json(folder / "run.json", about)
    _send_notes(client, about["id"], folder)
    for files in sorted((folder / "files").glob("[0-9]*")):
        for picture in files.glob(f"images/*+{START}+*"):
            picture.rename(picture.with_name(picture.name.replace(f"+{START}+", f"+{about['start']}+")))
        client.log_artifacts(about["id"], str(files))
        shutil.rmtree(files)


def _send_notes(client: MlflowClient, run_id: str, folder: Path) -> None:
    waiting, sending = folder / "waiting.jsonl", folder / "sending.jsonl"
    while True:
        with _locked(folder / "notes.lock"), suppress(FileNotFoundError):
            if not sending.exists():
                waiting.rename(sending)
        if not sending.exists():
            return
        batches = _batches([json.loads(line) for line in sending.read_text().splitlines()])
        while batches:
            try:
                _send_batch(client, run_id, *batches[0])
            except BaseException:
                write_text(sending, "".join(json.dumps(batch) + "\n" for batch in batches))
                raise
            del batches[0]
        sending.unlink()


def _batches(notes: list[Any]) -> list[tuple[str, list[Any]]]:
    """Neighbouring notes of a kind together, as many as MLflow takes at once."""
    found = []
    for kind, group in itertools.groupby(notes, key=lambda note: note[0]):
        entries = [entry for _, some in group for entry in some]
        most = 1000 if kind in ("metrics", "missing") else 100
        found += [(kind, entries[k : k + most]) for k in range(0, len(entries), most)]
    return found


def _send_batch(client: MlflowClient, run_id: str, kind: str, entries: list[list[Any]]) -> None:
    """Send one batch; what MLflow will never take is logged as an error and left out."""
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.exceptions import MlflowException

    if kind == "missing":
        keys = {key for key, *_ in entries}
        there = {(key, metric.step) for key in keys for metric in client.get_metric_history(run_id, key)}
        kind, entries = "metrics", [entry for entry in entries if (entry[0], entry[3]) not in there]
    try:
        if kind == "metrics":
            client.log_batch(run_id, metrics=[Metric(*entry) for entry in entries])
        elif kind == "params":
            client.log_batch(run_id, params=[Param(*entry) for entry in entries])
        elif kind == "tags":
            client.log_batch(run_id, tags=[RunTag(*entry) for entry in entries])
        for status, when in entries if kind == "status" else ():
            if status == "RUNNING":
                client.update_run(run_id, status=status)
            else:
                client.set_terminated(run_id, status, when)
    except MlflowException as error:
        if error.error_code not in REFUSALS:
            raise
        if len(entries) > 1:
            for half in (entries[: len(entries) // 2], entries[len(entries) // 2 :]):
                _send_batch(client, run_id, kind, half)
        else:
            log.error("MLflow does not take %s %s: %s", kind, entries[0], _line(error))


def _waits(folder: Path) -> str:
    """What is still to be sent, in words; "" for nothing."""
    notes = [folder / name for name in ("sending.jsonl", "waiting.jsonl")]
    lines = sum(len(path.read_text().splitlines()) for path in notes if path.exists())
    files = len(list((folder / "files").glob("[0-9]*")))
    return f"{lines} entries and {files} artifacts wait" if lines + files else ""


def _folders(spool: Path, pattern: str = "*") -> list[Path]:
    """Of runs, the oldest first; not those that are being made or removed, whose names begin with a dot."""
    return sorted(path for path in spool.glob(pattern) if not path.name.startswith("."))


def _make(folder: Path) -> IO[str]:
    """Make a folder that is claimed from the moment at which others can see it."""
    part = folder.with_name(f".{folder.name}")
    part.mkdir(parents=True)
    lock = _claim(part)
    assert lock is not None
    part.rename(folder)
    return lock


def _claim(folder: Path) -> IO[str] | None:
    """Keep other processes off a folder until the file is closed or we end; None if one of them has it, or had it and
    has removed it."""
    try:
        file = open(folder / "lock", "a")  # noqa: SIM115
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    if not (folder / "lock").exists():
        file.close()
        return None
    return file


def _remove(folder: Path) -> None:
    """Remove a folder that we have claimed; out of the sight of others first, who to claim it would write into it."""
    part = folder.with_name(f".{folder.name}")
    folder.rename(part)
    shutil.rmtree(part)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for a lock among threads and processes."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _client(uri: str) -> MlflowClient:
    for name, value in QUICK.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it warns of each try; we do once
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _monitors() -> list[Any]:
    """MLflow's monitors of this machine."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(Exception):  # what NVIDIA's library raises where there is no GPU
        monitors.append(GPUMonitor())
    return monitors


def _may_pass(error: Exception) -> bool:
    """Whether the same may work later: there was no answer, or one that the fault is the server's."""
    from mlflow.exceptions import InvalidUrlException, MlflowException

    if not isinstance(error, MlflowException):
        return isinstance(error, OSError)  # those of requests are
    status = error.get_http_status_code()
    return not isinstance(error, InvalidUrlException) and (status >= 500 or status in (408, 429))


def _line(error: BaseException) -> str:
    if re.match(r"API request to \S+ failed with (timeout )?exception", str(error)):
        return "no answer"
    text = re.sub("//[^/@ ]*@", "//", str(error)).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _shown(uri: str) -> str:
    """Without a password."""
    return re.sub("//[^/@]*@", "//", uri)


def _now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def _absolute(uri: str) -> str:
    """A relative SQLite file, made absolute: workers have other working directories."""
    prefix, _, path = uri.partition("sqlite:///")
    return f"sqlite:///{Path(path).resolve()}" if not prefix and path else uri


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys with dots between them, and their values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
