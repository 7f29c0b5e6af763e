"""For all tests: one thread, as threads of many small operations wait for each other on a busy machine; the order."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The whole graph first: it takes longest, and what runs beside it is many small tests."""
    items.sort(key=lambda item: item.get_closest_marker("graph") is None)


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
