"""See whether a run could work here: packages, machine, disk, storage, MLflow, DVC, data, weights, Ray and its workers.

Nothing is guessed: packages are compared with requirements.lock, the workers that params.yaml asks for meet and add
their numbers up (NCCL or gloo), what is written to storage, MLflow and DVC's remote is read back and removed. Each line
is ok, a warning (a run works, but look at it) or a problem, with its fix. Exit status 1 if there is a problem.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from pipeline import _extractors, _params, _ray, _sources, _stage, _track, prepare
from pipeline._stage import StageError
from pipeline._store import Bucket, store

LOCK = "requirements.lock"
OK, WARNING, PROBLEM = "ok", "warning", "problem"
ROOM = {WARNING: 10 * 2**30, PROBLEM: 2**30}  # bytes that should be free
SHOWN = 3  # packages named in a line


@dataclass(frozen=True)
class Finding:
    """One line.

    Args:
        what: Was looked at.
        state: OK, WARNING or PROBLEM.
        told: What was found, with the fix if it is not ok.
    """

    what: str
    state: str
    told: str


Check = Callable[[_params.Params], Iterator[Finding]]


def main(params: _params.Params, *, as_json: bool = False) -> None:
    """Raises SystemExit with status 1 if there is a problem."""
    found = []
    for name, check in CHECKS.items():
        for finding in checked(name, check, params):
            found.append(finding)
            if not as_json:
                print(line(finding), flush=True)
    if as_json:
        print(json.dumps([dataclasses.asdict(each) for each in found], indent=2))
    if any(each.state == PROBLEM for each in found):
        sys.exit(1)


def line(finding: Finding) -> str:
    """A finding for people."""
    return f"{finding.state:<9}{finding.what:<12}{finding.told}"


def checked(name: str, check: Check, params: _params.Params) -> Iterator[Finding]:
    """What a check finds; what it raises is a problem."""
    try:
        yield from check(params)
    except StageError as error:
        yield Finding(name, PROBLEM, str(error))
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        yield Finding(name, PROBLEM, f"{type(error).__name__}: {told}")


def python(params: _params.Params) -> Iterator[Finding]:
    """Its version, and whether DVC and git will find a repository."""
    yield Finding("python", OK, f"{platform.python_version()}, {sys.executable}")
    if _track.revision() is None:
        yield Finding("git", WARNING, "not a git repository: runs do not know their code's commit; DVC needs git, too")


def packages(params: _params.Params) -> Iterator[Finding]:
    """The packages of requirements.lock."""
    lock = _ray.ROOT / LOCK
    if not lock.is_file():
        yield Finding("packages", WARNING, f"no {LOCK} beside the code: versions are not compared")
        return
    pinned = [Requirement(text) for text in lock.read_text().splitlines() if text and not text.startswith(("#", " "))]
    wanted = {each.name: str(each.specifier).removeprefix("==") for each in pinned if applies(each)}
    there = {name: installed(name) for name in wanted}
    missing = [name for name, version in there.items() if version is None]
    other = [f"{name} {there[name]} for {wanted[name]}" for name in wanted if there[name] not in (None, wanted[name])]
    fix = f"make setup, or pip install -r {LOCK}"
    if missing:
        yield Finding("packages", PROBLEM, f"{some(missing)} not installed: {fix}")
    if other:
        yield Finding("packages", WARNING, f"{some(other)}: {fix}")
    if not missing and not other:
        yield Finding("packages", OK, f"{len(wanted)} as in {LOCK}, torch {torch.__version__}")


def applies(requirement: Requirement) -> bool:
    """Whether a package is wanted on this system."""
    return requirement.marker is None or requirement.marker.evaluate()


def installed(name: str) -> str | None:
    """The version of a package that is here, without what says how it was built."""
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def some(names: list[str]) -> str:
    """The first of them, and how many there are besides."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def machine(params: _params.Params) -> Iterator[Finding]:
    """Cores and GPUs of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
        yield Finding("machine", OK, f"{cores} cores; {', '.join(gpus)}; CUDA {torch.version.cuda}")
    elif Path("/proc/driver/nvidia").exists():
        told = f"an NVIDIA driver, but torch sees no GPU: is it new enough for CUDA {torch.version.cuda}?"
        yield Finding("machine", PROBLEM, f"{told} see nvidia-smi and CUDA_VISIBLE_DEVICES")
    else:
        yield Finding("machine", OK, f"{cores} cores, no GPU")


def workers(params: _params.Params) -> Iterator[Finding]:
    """The cluster, and a meeting of the workers that a training would have."""
    if address := _ray.given_address(params.runtime):
        yield reached(address)
    with _ray.cluster(params.runtime, quiet=True):
        there = _ray.resources()
        unit, asked = ("GPU" if there["GPU"] else "CPU"), _ray.most(params.runtime.workers)
        many = "s" * (there["nodes"] != 1)
        told = f"{address or 'a cluster of this machine alone'}: {there['nodes']} node{many}, "
        told += f"{there['CPU']:g} CPUs, {there['GPU']:g} GPUs"
        if there[unit] < 1:
            yield Finding("ray", PROBLEM, f"{told}: no worker can start: add nodes")
            return
        coming = min(asked, int(there[unit]))
        if coming < asked:
            yield Finding(
                "ray", WARNING, f"{told}: runtime.workers={asked} wait until there are more {unit}s, or lower it"
            )
        else:
            yield Finding("ray", OK, told)
        runtime = dataclasses.replace(params.runtime, workers=coming)
        met = _ray.meet(meet, params.runtime.storage, runtime)
    yield from compared(met)


def reached(address: str) -> Finding:
    """Whether something listens at a Ray address."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return Finding("port", OK, f"{address} names no port")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise StageError(
            f"nothing answers at {address} ({error.strerror or error}): is the cluster up (`ray status`), the port "
            "open from here? set RAY_ADDRESS or runtime.ray_address, or neither for a cluster of this machine"
        ) from error
    return Finding("port", OK, f"{address} answers")


def meet(storage: str, world: _ray.World) -> dict[str, Any]:
    """On each worker: add the ranks up with the others, and tell what is here."""
    total = torch.tensor(float(world.rank + 1), device=world.device)
    world.sum(total)
    problem = None
    if isinstance(where := store(storage), Bucket):
        try:
            where.check()
        except StageError as error:
            problem = str(error)
    return {
        "rank": world.rank,
        "size": world.size,
        "host": socket.gethostname(),
        "device": str(world.device),
        "sum": float(total),
        "backend": torch.distributed.get_backend() if world.size > 1 else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "storage": problem,
        "free": shutil.disk_usage(tempfile.gettempdir()).free,
    }


def compared(met: list[dict[str, Any]]) -> Iterator[Finding]:
    """Whether the workers found each other, and are like this process."""
    size, hosts = met[0]["size"], sorted({each["host"] for each in met})
    expected = size * (size + 1) / 2
    wrong = [each["rank"] for each in met if each["sum"] != expected]
    if wrong or len(met) != size:
        yield Finding(
            "workers", PROBLEM, f"{len(met)} of {size} told, ranks {wrong} added up wrongly: see the workers' logs"
        )
    else:
        how = f", numbers added up by {met[0]['backend']}" if size > 1 else ""
        yield Finding("workers", OK, f"{size} on {some(hosts)}, {met[0]['device']}{how}")
    here = {"python": platform.python_version(), "torch": torch.__version__}
    for each in met:
        for name, version in each["versions"].items():
            if version != here[name]:
                told = f"{name} {version} on {each['host']}, {here[name]} here: install the same from {LOCK}"
                yield Finding("workers", PROBLEM, told)
    for problem in sorted({f"from {each['host']}: {each['storage']}" for each in met if each["storage"]}):
        yield Finding("storage", PROBLEM, problem)
    for each in {each["host"]: each for each in met}.values():
        yield from room(each["free"], f"/tmp of {each['host']}")


def storage(params: _params.Params) -> Iterator[Finding]:
    """Write, read, remove; and the room where it is a folder."""
    where = store(params.runtime.storage)
    where.check()
    yield Finding("storage", OK, f"{where.uri}: written, read, removed")
    if not isinstance(where, Bucket):
        yield from room(shutil.disk_usage(where.uri).free, where.uri)


def disk(params: _params.Params) -> Iterator[Finding]:
    """Room for outputs, and for Ray's objects."""
    free = shutil.disk_usage(".").free
    yield Finding("disk", OK, f"{free / 2**30:.0f} GiB free at {Path.cwd()}")
    yield from room(free, str(Path.cwd()))
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < 2 * 2**30:
        told = f"/dev/shm has {size / 2**20:.0f} MiB: Ray's objects go to /tmp, slower; in a container: --shm-size=8g"
        yield Finding("disk", WARNING, told)


def room(free: int, where: str) -> Iterator[Finding]:
    """A line where there is little room."""
    state = next((state for state in (PROBLEM, WARNING) if free < ROOM[state]), None)
    if state is not None:
        yield Finding("disk", state, f"{free / 2**30:.1f} GiB free at {where}: make room")


def mlflow(params: _params.Params) -> Iterator[Finding]:
    """A run that is made, written to and deleted."""
    yield Finding("mlflow", OK, f"{_track.probe(params)}: a run made, written, read, deleted")


def dvc(params: _params.Params) -> Iterator[Finding]:
    """DVC's default remote."""
    from dvc.config import NoRemoteError
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        remote = Repo().cloud.get_remote()
    except NotDvcRepoError:
        yield Finding("dvc", PROBLEM, f"{Path.cwd()} is in no DVC repository: run from a clone of the project")
        return
    except NoRemoteError:
        yield Finding("dvc", OK, "no remote: outputs stay on this machine; dvc remote add -d NAME s3://... shares them")
        return
    name, content = remote.fs.join(remote.path, f".probe-{os.getpid()}"), b"probe"
    remote.fs.makedirs(remote.path, exist_ok=True)
    remote.fs.pipe_file(name, content)
    same = remote.fs.cat_file(name) == content
    remote.fs.remove(name)
    if same:
        yield Finding("dvc", OK, f"remote {remote.name}, {remote.path}: written, read, removed")
    else:
        yield Finding("dvc", PROBLEM, f"remote {remote.name}, {remote.path}: what was written is not what is read")


def data(params: _params.Params) -> Iterator[Finding]:
    """Prepared images, or the files that they are made of."""
    if (prepare.OUT / "manifest.json").is_file() and (made := prepare.manifest())["name"] == params.data.name:
        counts = ", ".join(f"{made['splits'][split]['n']:,} {split}" for split in prepare.SPLITS)
        yield Finding("data", OK, f"{prepare.OUT} has {params.data.name}: {counts} images")
        return
    missing = _sources.missing(params.data)
    if not missing:
        yield Finding("data", OK, f"{params.data.name}: all there, not prepared yet")
        return
    told = some([str(each) for each in missing])
    yield Finding("data", WARNING, f"{told} will be downloaded: python -m pipeline.fetch does so now")


def weights(params: _params.Params) -> Iterator[Finding]:
    """Inception's, where they are asked for."""
    if params.evaluate.extractor == "classifier":
        yield Finding("weights", OK, "none needed: the features are those of a classifier")
        return
    path = _extractors.inception_path(params.evaluate.inception_weights)
    if path.is_file():
        _extractors.inception(path)
        yield Finding("weights", OK, f"{path}, by its hash")
    elif params.evaluate.extractor == "auto":
        yield Finding(
            "weights", OK, "no Inception weights: labelled data is judged by a classifier, other data not at all"
        )
    else:
        _extractors.inception(path)  # says how to get them


CHECKS: dict[str, Check] = {
    "python": python,
    "packages": packages,
    "machine": machine,
    "disk": disk,
    "storage": storage,
    "mlflow": mlflow,
    "dvc": dvc,
    "data": data,
    "weights": weights,
    "ray": workers,
}


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", dest="as_json", action="store_true", help="print JSON: what, state, told of each line"
    )


if __name__ == "__main__":
    from pipeline import doctor as this  # since what is defined in __main__ would travel to the workers by value

    _stage.run("doctor", __doc__, this.main, _options)
