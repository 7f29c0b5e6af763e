"""Fixtures for the stages: checked parameters from conf/, and an empty folder to run in."""

import functools
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import _params, _ray
from pipeline.compose import compose

Compose = Callable[..., _params.Params]


@pytest.fixture(scope="session")
def compose_params() -> Compose:
    """Params from conf/ with overrides: compose_params("data=patches", "data.resolution=16").

    A composition takes a quarter of a second, so each is done once; dataclasses.replace changes one at no cost.
    """
    return functools.cache(lambda *overrides: _params.parse(compose(list(overrides))))


@pytest.fixture
def params(compose_params: Compose) -> _params.Params:
    """The default Params; change them with dataclasses.replace."""
    return compose_params()


@pytest.fixture(scope="session")
def one_cluster(compose_params: Compose) -> Iterator[None]:
    """A local Ray cluster for all stages that are called in this process: each of its own takes 10 s to come and go."""
    with _ray.cluster(compose_params().runtime):
        yield


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new empty folder, made the current one, so that out/ lands there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a file system of so many MB, small_disk(4), with more options, small_disk(1, "ro")."""
    folder = tmp_path / "small"

    def mount(megabytes: int, *options: str) -> Path:
        folder.mkdir()
        flags = ",".join([f"size={megabytes}m", *options])
        subprocess.run(["mount", "-t", "tmpfs", "-o", flags, "tmpfs", folder], check=True)
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)
