"""The MLflow run that the stages of one `dvc repro` share; the only importer of mlflow.

A stage joins the newest unfinished run with the same parameters and code, or starts one; the report ends it. So a
repeated `dvc repro` after a crash goes on in the same run, and other parameters make another run to compare with.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import _params
from pipeline._stage import log
from pipeline._store import code_digest, fingerprint

if TYPE_CHECKING:
    from mlflow import MlflowClient

RESULT_SECTIONS = [field.name for field in dataclasses.fields(_params.Params) if field.name != "runtime"]
KEY = "ncsn.fingerprint"


@dataclass(frozen=True)
class Run:
    """A run in the tracking store; a plain value that may travel to workers."""

    uri: str
    id: str

    @property
    def client(self) -> MlflowClient:
        return _client(self.uri)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters, nested ones as section.key; a parameter keeps its first value for good."""
        from mlflow.entities import Param

        flat = [Param(key, str(value)) for key, value in _flatten(values)]
        self.client.log_batch(self.id, params=flat)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        self.client.log_batch(self.id, tags=[RunTag(key, value) for key, value in values.items()])

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at one step."""
        self.history([(step, values)])

    def history(self, rows: list[tuple[int, Mapping[str, float]]]) -> None:
        """Log numbers at many steps."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        flat = [Metric(key, value, now, step) for step, values in rows for key, value in values.items()]
        for k in range(0, len(flat), 1000):  # the most that one batch may hold
            self.client.log_batch(self.id, metrics=flat[k : k + 1000])

    def logged(self, metric: str) -> bool:
        """Whether the run has this metric."""
        return metric in self.client.get_run(self.id).data.metrics

    def image(self, pixels: np.ndarray, key: str, step: int) -> None:
        """Log a uint8 picture (H, W) or (H, W, 3) under a key with a step, which makes a slider in the UI."""
        self.client.log_image(self.id, pixels, key=key, step=step, synchronous=True)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a file, or a folder's files."""
        if path.is_dir():
            self.client.log_artifacts(self.id, str(path), folder or path.name)
        else:
            self.client.log_artifact(self.id, str(path), folder)

    def finish(self) -> None:
        """Mark the run as complete; a later stage starts another one."""
        self.client.set_terminated(self.id, "FINISHED")


@contextmanager
def run(params: _params.Params) -> Iterator[Run]:
    """Join or start the run of these parameters and this code; it is marked FAILED or KILLED if the body raises."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or _absolute(params.runtime.tracking_uri)
    client = _client(uri)
    current = Run(uri, _find(client, params) or _start(client, params))
    client.set_terminated(current.id, "RUNNING")
    try:
        yield current
    except BaseException as error:
        client.set_terminated(current.id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise


def revision() -> str | None:
    """The git commit of the working directory, with "-dirty" if tracked files differ; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def _key(params: _params.Params) -> str:
    return fingerprint([_params.as_dict(params, *RESULT_SECTIONS), code_digest("ncsn", "pipeline")])


def _find(client: MlflowClient, params: _params.Params) -> str | None:
    experiment = client.get_experiment_by_name(params.runtime.experiment)
    if experiment is None:
        return None
    query = f"tags.`{KEY}` = '{_key(params)}' and attributes.status != 'FINISHED'"
    found = client.search_runs([experiment.experiment_id], query, max_results=1, order_by=["start_time DESC"])
    return found[0].info.run_id if found else None


def _start(client: MlflowClient, params: _params.Params) -> str:
    experiment = client.get_experiment_by_name(params.runtime.experiment)
    if experiment is not None:
        experiment_id = experiment.experiment_id
    else:
        # A database beside the project keeps its artifacts beside it too; a server says itself where they go.
        local = client.tracking_uri.startswith("sqlite:")
        location = (Path.cwd() / "mlartifacts").as_uri() if local else None
        experiment_id = client.create_experiment(params.runtime.experiment, artifact_location=location)
    key = _key(params)
    tags = {KEY: key, "mlflow.source.name": "dvc repro", "runtime.workers": str(params.runtime.workers)}
    if commit := revision():
        tags["mlflow.source.git.commit"] = commit
    if name := os.environ.get("DVC_EXP_NAME"):
        tags["dvc.experiment"] = name
    name = f"{params.data.name}-{params.model.name}-{key[:6]}"
    created = Run(client.tracking_uri, client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)
    created.params(_params.as_dict(params, *RESULT_SECTIONS))
    log.info("MLflow run %s (%s)", name, created.id)
    return created.id


def _client(uri: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _absolute(uri: str) -> str:
    """A relative SQLite file, made absolute: workers have other working directories."""
    prefix, _, path = uri.partition("sqlite:///")
    return f"sqlite:///{Path(path).resolve()}" if not prefix and path else uri


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
