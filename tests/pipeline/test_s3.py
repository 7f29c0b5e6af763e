"""Storage on S3: against moto in this process for faults, against a real server for what only a real one does."""

import logging
import pickle
import socket

import pytest
from moto.server import ThreadedMotoServer

from pipeline import _store
from pipeline._stage import StageError

ACCESS, SECRET = "AKIATESTTESTTEST", "secretsecretsecret"


def _environment(monkeypatch, endpoint, access=ACCESS, secret=SECRET):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    _store._client.cache_clear()


@pytest.fixture(autouse=True)
def _fresh_client():
    yield
    _store._client.cache_clear()


@pytest.fixture(scope="module")
def moto():
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(moto, monkeypatch, request):
    """An empty prefix of a bucket on moto."""
    _environment(monkeypatch, moto)
    _store._client().create_bucket(Bucket="data")
    return _store.store(f"s3://data/{request.node.name}/runs/")


def test_a_bucket_behaves_as_a_folder(bucket, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 50_000)  # 12.8 MB: in parts
    for where in (bucket, _store.store(str(tmp_path / "folder"))):
        where.check()
        assert where.names() == []
        step = where / "step_00000260"
        step.write("state.safetensors", source)
        step.write("meta.json", b"{}")
        where.write("step_000002", b"another name that begins alike")
        assert where.names() == ["step_000002", "step_00000260/meta.json", "step_00000260/state.safetensors"]
        assert step.names() == ["meta.json", "state.safetensors"]
        assert step.read("state.safetensors") == source.read_bytes()
        step.write("meta.json", b'{"a": 1}')
        assert step.read("meta.json") == b'{"a": 1}'
        step.fetch("state.safetensors", tmp_path / "copy" / "state")
        assert (tmp_path / "copy" / "state").read_bytes() == source.read_bytes()
        for ask in (step.read, lambda name: step.fetch(name, tmp_path / "copy" / "none")):  # noqa: B023
            with pytest.raises(FileNotFoundError):
                ask("none")
        assert [path.name for path in (tmp_path / "copy").iterdir()] == ["state"]
        where.remove("step_00000260")
        where.remove("never there")
        assert where.names() == ["step_000002"]
        where.remove("step_000002")
        assert where.names() == []


def test_names_are_complete_beyond_a_page_and_know_no_markers_of_folders(bucket):
    client = _store._client()
    names = [f"{i:04d}" for i in range(1005)]
    for name in [*names, "sub/"]:
        client.put_object(Bucket="data", Key=bucket._key(name), Body=b"")
    assert bucket.names() == names


def test_a_store_is_a_plain_value(bucket):
    bucket.write("x", b"1")
    copy = pickle.loads(pickle.dumps(bucket))
    assert copy == bucket
    assert copy.read("x") == b"1"
    assert SECRET.encode() not in pickle.dumps(bucket)
    assert _store.store("s3://data") / "a" == _store.store("s3://data/a")


@pytest.mark.parametrize("uri", ["s3://", "s3:/bucket/x", "s3://Bucket/x", "s3://bucket//x", "gs://bucket/x"])
def test_other_uris_are_refused(uri):
    with pytest.raises(StageError, match=r"expected s3://bucket/prefix or a folder: set runtime\.storage"):
        _store.store(uri)


def test_a_missing_bucket_and_missing_credentials_are_named(bucket, monkeypatch, tmp_path):
    with pytest.raises(StageError, match=r"storage s3://none/x at http://127.*: there is no such bucket: make it"):
        _store.store("s3://none/x").check()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    _store._client.cache_clear()
    with pytest.raises(StageError, match="no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        bucket.check()


def test_an_endpoint_that_is_none_is_named(monkeypatch, caplog):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    _environment(monkeypatch, endpoint)
    with (
        caplog.at_level(logging.WARNING, "pipeline"),
        pytest.raises(StageError, match=r"still so after \d s") as raised,
    ):
        _store.Bucket("s3://data/x", patience=1).check()
    assert endpoint in str(raised.value)
    assert "\n" not in str(raised.value)
    (warning,) = caplog.messages
    assert "trying again for 1 s" in warning
    _environment(monkeypatch, "127.0.0.1:1")
    with pytest.raises(StageError, match="Invalid endpoint: 127"):
        _store.Bucket("s3://data/x").check()
