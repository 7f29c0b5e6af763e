"""For all tests: one thread, as threads of many small operations wait for each other on a busy machine; the order."""

import functools
import importlib
import os
import shutil
import signal
import subprocess

import pytest
import torch

torch.set_num_threads(1)

# A shell starts what runs in its background with SIGINT ignored, and all that this starts: Ctrl-C could not be tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than cores: some tests wait, for hosts that come and for others that go."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests share a process, as with `--dist loadfile`; so do those of all files that share the one cluster of
    Ray's, which would cost 8 CPU seconds to start in each process and 3 a minute to keep."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "one cluster" if _uses_one_cluster(config.rootpath / file) else file

    return Scheduling(config, log) if config.option.dist == "loadfile" else None


@functools.cache
def _uses_one_cluster(file):
    return "one_cluster" in file.read_text()


def pytest_collection_modifyitems(items):
    """What takes longest first: graphs, clusters, some files; so that at the end no core is without work."""

    def rank(item):
        path, long = item.path, ("test_benchmarks", "test_train", "test_s3", "test_track")
        return [not item.get_closest_marker("graph"), path.parent.name != "cluster", path.stem not in long]

    items.sort(key=rank)


def pytest_runtest_setup(item):
    """What the markers ask for and a machine may lack: a GPU, root, the tools and the right to start hosts, which
    `.ci/run` installs; and the patience for `slow`."""
    if item.get_closest_marker("slow") and os.environ.get("NCSN_SLOW") != "1":
        pytest.skip("takes minutes: NCSN_SLOW=1 runs it")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("root") and not _may_mount():
        pytest.skip("mounts file systems, which takes root on Linux")
    for marker, module, kind in (("hosts", "netlab", "NetLab"), ("slurm", "slurmlab", "SlurmLab")):
        if item.get_closest_marker(marker) and (missing := _no_lab(module, kind)):
            pytest.skip(f"starts hosts of this machine: {missing}")


@functools.cache
def _may_mount():
    unshare = shutil.which("unshare")
    command = [unshare, "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return unshare is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0


@functools.cache
def _no_lab(module, kind):
    return getattr(importlib.import_module(f"tests.cluster.{module}"), kind).missing()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A repository with digits and their schedule."""
    from tests.stages import digits

    return digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def inside(clone, monkeypatch):
    monkeypatch.chdir(clone)
    return clone


@pytest.fixture(scope="module")
def object_store(tmp_path_factory):
    """A real S3 server, SeaweedFS, with one empty bucket; it can be stopped, killed and started again."""
    from pipeline import s3

    with s3.ObjectStore(tmp_path_factory.mktemp("s3"), fsync=False) as server:
        yield server


@pytest.fixture
def on_s3(object_store, monkeypatch):
    """The same, with our environment set for it."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in object_store.client.items():
        monkeypatch.setenv(name, value)
    return object_store
