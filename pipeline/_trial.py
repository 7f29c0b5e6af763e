"""One trial of a sweep as Ray Tune's process sees it: a program of its own, whose reports are passed on.

What imports this module is that process, which waits most of its time: so it imports little.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import _params

POLL = 0.5  # seconds between looks at what the program has reported
REPORTS = "reports.jsonl"
LOG, FAILED, DONE = "log.txt", "failed.txt", "trial.json"


class TrialError(RuntimeError):
    """What a trial's program ended with."""


@dataclass(frozen=True)
class Plan:
    """What all trials of a sweep have in common; a plain value.

    Args:
        root: Of the project's code.
        folder: Of the sweep; each trial gets a folder there, in which its program runs.
        inputs: Outputs of the graph that a trial reads, linked into its folder.
        program: The command.
        environment: In addition to that of Ray Tune's process.
        params: As nested dictionaries.
        variants: Settings by names; one named in a trial's setting, as "variant", is the part that trials share.
    """

    root: str
    folder: str
    inputs: tuple[str, ...]
    program: tuple[str, ...]
    environment: Mapping[str, str]
    params: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def run(plan: Plan, name: str, setting: Mapping[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    """Run the program of one trial; it ends when this process does.

    Args:
        plan: Of the sweep.
        name: Of the trial, and its folder.
        setting: What it has of its own: values by section.key, and the name of a variant.
        report: Takes what the program has reported, a line of JSON each.

    Raises:
        TrialError: If the program failed; its last line says why.
    """
    folder = Path(plan.folder, name)
    (folder / "out").mkdir(parents=True, exist_ok=True)
    for path in plan.inputs:
        with contextlib.suppress(FileExistsError):
            (folder / path).symlink_to(Path(plan.root, path))
    (folder / "params.yaml").write_text(_params.to_yaml(params_of(plan, setting)))
    reports = folder / REPORTS
    for left in (reports, folder / FAILED):  # by an earlier try
        left.unlink(missing_ok=True)
    with open(folder / LOG, "ab") as log:
        process = subprocess.Popen(
            plan.program,
            cwd=folder,
            env=os.environ | plan.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        told, ended = 0, False
        try:
            while not ended:
                time.sleep(POLL)
                ended = process.poll() is not None
                lines = reports.read_text().split("\n")[:-1] if reports.exists() else []  # whole ones
                for line in lines[told:]:
                    report(json.loads(line))
                told = len(lines)
        finally:
            if not ended:
                process.terminate()
                process.wait()
    if process.returncode:
        reason = _last_line(folder / LOG) or f"exit status {process.returncode}"
        (folder / FAILED).write_text(reason + "\n")
        raise TrialError(reason)


def params_of(plan: Plan, setting: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a trial, as nested dictionaries."""
    tree = {section: dict(values) for section, values in plan.params.items()}
    shared = plan.variants[setting["variant"]] if "variant" in setting else {}
    for key, value in {**shared, **setting}.items():
        if key == "variant":
            continue
        section, name = key.split(".")
        tree[section][name] = value
    return tree


def tell(**values: Any) -> None:
    """Report, from within the program."""
    with open(REPORTS, "a") as file:
        file.write(json.dumps(values) + "\n")


def _end_with_parent() -> None:
    """Take SIGTERM, which Ray's processes have blocked; on Linux it comes when the thread that started us ends."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGUSR1})
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else ""
