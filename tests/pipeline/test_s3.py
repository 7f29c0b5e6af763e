"""Storage on S3: against moto in this process for faults, against a real server for what only a real one does."""

import dataclasses
import io
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import urllib3
from botocore.awsrequest import AWSResponse
from moto.server import ThreadedMotoServer

from pipeline import _store, _track, s3
from pipeline._stage import StageError

ROOT = Path(__file__).parent.parent.parent

ACCESS, SECRET = "AKIATESTTESTTEST", "secretsecretsecret"


def _environment(monkeypatch, endpoint, access=ACCESS, secret=SECRET):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


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


def test_names_are_complete_beyond_a_page_and_know_no_markers_of_folders(bucket, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    client = _store._client()
    names = [f"{i:04d}" for i in range(25)]
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


class Faults:
    """Makes answers of a client faulty: each call of `operation` takes the next status, None for a sound answer."""

    def __init__(self, client, operation, *statuses):
        self.left = list(statuses)
        client.meta.events.register_first(f"before-send.s3.{operation}", self._send)
        self.stop = lambda: client.meta.events.unregister(f"before-send.s3.{operation}", self._send)

    def _send(self, request, **_):
        status = self.left.pop(0) if self.left else None
        if status is not None:
            body = f"<Error><Code>{FAULTS[status]}</Code><Message>no {ACCESS} {SECRET}</Message></Error>".encode()
            raw = urllib3.HTTPResponse(io.BytesIO(body), preload_content=False)
            return AWSResponse(request.url, status, {"content-type": "application/xml"}, raw)


FAULTS = {500: "InternalError", 503: "SlowDown", 403: "AccessDenied", 501: "NotImplemented", 404: "NoSuchUpload"}


@pytest.mark.parametrize("operation", ["PutObject", "GetObject", "ListObjectsV2", "DeleteObject"])
def test_faults_of_the_server_are_waited_out(bucket, operation, monkeypatch, caplog):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    bucket.write("x", b"old")
    faults = Faults(_store._client(), operation, *[503, 500] * 4)
    try:
        bucket.write("x", b"new")
        assert bucket.read("x") == b"new"
        assert bucket.names() == ["x"]
        bucket.remove("x")
    finally:
        faults.stop()
    assert faults.left == []
    assert bucket.names() == []
    waits, well = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "trying again for 180 s" in waits
    assert "well again" in well


def test_an_upload_that_the_server_forgot_is_begun_anew(bucket, caplog):
    content = bytes(12 << 20)
    faults = Faults(_store._client(), "UploadPart", 404)
    try:
        bucket.write("x", content)
    finally:
        faults.stop()
    assert faults.left == []
    assert bucket.read("x") == content


@pytest.mark.parametrize(("status", "message"), [(403, "access is refused"), (501, "does it speak S3 in full")])
def test_refusals_are_not_waited_out_and_name_no_secret(bucket, status, message, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waited") if seconds > 3 else None)
    faults = Faults(_store._client(), "PutObject", *[status] * 9)
    try:
        with pytest.raises(StageError, match=message) as raised:
            bucket.write("x", b"")
    finally:
        faults.stop()
    assert ACCESS not in str(raised.value)
    assert SECRET not in str(raised.value)


def _size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.dat"))


def test_a_real_server_stores_objects(on_s3, tmp_path):
    where = _store.store(f"s3://{s3.BUCKET}/real")
    where.check()
    content = os.urandom(20 << 20)
    (tmp_path / "big").write_bytes(content)
    step = where / "step_00000001"
    step.write("state.safetensors", tmp_path / "big")
    step.write("meta.json", b"{}")
    step.fetch("state.safetensors", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert where.names() == ["step_00000001/meta.json", "step_00000001/state.safetensors"]
    where.remove("step_00000001")
    assert where.names() == []
    with pytest.raises(FileNotFoundError):
        step.read("meta.json")


def test_a_server_killed_in_a_save_and_started_again_costs_a_wait_and_nothing_else(on_s3, tmp_path, caplog):
    where = _store.store(f"s3://{s3.BUCKET}/killed")
    old, new = os.urandom(24 << 20), os.urandom(24 << 20)
    where.write("state", old)
    (tmp_path / "new").write_bytes(new)
    seen, ended, data = [], threading.Event(), on_s3.log.parent / "data"

    def watch():
        while not ended.is_set():
            seen.append(where.read("state"))

    def crash():
        before, end = _size(data), time.monotonic() + 30
        while _size(data) < before + (4 << 20) and time.monotonic() < end:
            time.sleep(0.001)
        on_s3.stop(signal.SIGKILL)
        time.sleep(4)  # longer than botocore itself tries
        on_s3.start()

    watching, crashing = threading.Thread(target=watch), threading.Thread(target=crash)
    crashing.start()
    watching.start()
    where.write("state", tmp_path / "new")
    ended.set()
    watching.join()
    crashing.join()
    assert any("trying again" in message for message in caplog.messages), "the crash came too late to test anything"
    assert where.read("state") == new
    assert all(content in (old, new) for content in seen)
    assert where.names() == ["state"]


def test_a_writer_killed_in_a_save_leaves_what_was_there(on_s3):
    where = _store.store(f"s3://{s3.BUCKET}/writer")
    where.write("state", b"old")
    before = _size(on_s3.log.parent / "data")
    code = f"from pipeline import _store; _store.store({where.uri!r}).write('state', bytes(200 << 20))"
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    end = time.monotonic() + 60
    while _size(on_s3.log.parent / "data") < before + (8 << 20):
        assert writer.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    writer.kill()
    writer.wait()
    assert where.read("state") == b"old"
    assert where.names() == ["state"]


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_end_in_one_line_that_does_not_repeat_them(on_s3, variable):
    environment = os.environ | {variable: "wrongwrongwrong"}
    code = f"from pipeline import _store; _store.store('s3://{s3.BUCKET}/runs').check()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode != 0
    line = said.strip().splitlines()[-1]
    assert "access is refused" in line
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in line
    for secret in (environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in said


def test_a_bucket_that_is_not_there_is_not_made(on_s3):
    with pytest.raises(StageError, match="there is no such bucket"):
        _store.store("s3://another/runs").check()


@pytest.mark.root
def test_a_full_disk_of_the_server_spoils_nothing(small_disk, monkeypatch):
    with s3.ObjectStore(small_disk(16), fsync=False) as server:
        for name, value in server.client.items():
            monkeypatch.setenv(name, value)
        where = _store.Bucket(s3.STORAGE, patience=0)
        k = 0
        with pytest.raises(
            StageError, match=r"the server answers InternalError \(500\): still so .* its disk not full"
        ):
            for k in range(9):
                where.write("state", bytes([k]) * (4 << 20))
        assert k >= 1
        assert where.read("state") == bytes([k - 1]) * (4 << 20)
        assert where.names() == ["state"]
        server.stop(signal.SIGKILL)  # on a full disk it does not end by itself


def test_artifacts_of_a_local_database_go_to_the_storage(on_s3, workdir, params, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runtime = dataclasses.replace(params.runtime, storage=f"s3://{s3.BUCKET}/tracked/")
    (workdir / "file.txt").write_text("text")
    with _track.run(dataclasses.replace(params, runtime=runtime)) as run:
        run.artifact(workdir / "file.txt", "sub")
    (name,) = _store.store(f"s3://{s3.BUCKET}/tracked/mlflow").names()
    assert name.endswith("/artifacts/sub/file.txt")


def test_one_machine_serves_dvc_and_mlflow(workdir, monkeypatch):
    """python -m pipeline.s3: DVC pushes and pulls, artifacts go through MLflow, nothing is left when it is stopped."""
    port, mlflow_port = s3.free_ports(2)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def shell(script):
        done = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shell(
        "git init -q; dvc init -q; mkdir data; echo 1 > data/a; dvc add -q data; git check-ignore -q .dvc/config.local"
    )
    command = [sys.executable, "-m", "pipeline.s3", "--port", str(port), "--mlflow-port", str(mlflow_port)]
    serving = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = []
        for line in serving.stdout:
            said.append(line)
            if line.startswith("Ctrl-C"):
                break
        assert "dvc exp run -S runtime.storage=s3://ncsn/runs" in "".join(said)
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.stderr == f"error: port {port} is taken: is this running already? Else choose another by --port\n"
        where = shell(
            """. s3data/env
            dvc push -q; rm -r .dvc/cache data; dvc pull -q; cat data/a
            python - <<END
import mlflow
with mlflow.start_run() as run:
    mlflow.log_text("text", "sub/file+1.txt")
print(run.info.artifact_uri, mlflow.artifacts.load_text(run.info.artifact_uri + "/sub/file+1.txt"))
END
            env | grep ^AWS_"""
        )
        assert where.startswith("1\n")
        assert "mlflow-artifacts:/" in where
        assert " text\n" in where
        for line in where.splitlines():
            if line.startswith("AWS_"):
                monkeypatch.setenv(*line.split("=", 1))
        names = _store.store(f"s3://{s3.BUCKET}").names()
        assert sum(name.startswith("dvc/files/md5/") for name in names) == 2
        assert sum(name.startswith("mlflow/") and name.endswith("/sub/file+1.txt") for name in names) == 1
    finally:
        serving.send_signal(signal.SIGINT)
        assert serving.wait(60) == 0
    assert s3.ObjectStore(Path("s3data"), port).client["AWS_SECRET_ACCESS_KEY"] == os.environ["AWS_SECRET_ACCESS_KEY"]
    assert Path("s3data").stat().st_mode & 0o077 == 0
    for number in (port, mlflow_port):
        with socket.create_server(("127.0.0.1", number)):
            pass
