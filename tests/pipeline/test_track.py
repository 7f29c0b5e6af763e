"""What is logged arrives once and in order, whatever the tracking server does; and it never stops a stage."""

import dataclasses
import http.server
import logging
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from pipeline import _track, s3
from pipeline._stage import StageError
from pipeline.compose import compose

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A database of MLflow's without runs, which takes seconds to make."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(empty, workdir, params, monkeypatch):
    """Params whose runs go to an empty database in an empty folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty, workdir / "mlflow.db")
    return params


def _wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def _client():
    return MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")


def _runs(client):
    experiment = client.get_experiment_by_name("ncsn")
    return client.search_runs([experiment.experiment_id], order_by=["start_time ASC"]) if experiment else []


def _history(client, run, key):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]


def _images(client, run):
    return [artifact.path for artifact in client.list_artifacts(run.info.run_id, "images")]


def test_a_run_keeps_what_it_is_given(database, workdir):
    with _track.run(database) as run:
        run.params({"schedule": {"L": 4, "sigma_1": 0.5}})
        run.tags({"a": "b"})
        for step in range(3):
            run.metrics({"train/loss": np.float32(step), "nan": float("nan")}, step)
        for shade in (0, 255):
            run.image(np.full((4, 4), shade, np.uint8), "train/samples", 2)
        (workdir / "file.txt").write_text("then")
        run.artifact(workdir / "file.txt", "sub")
        (workdir / "file.txt").write_text("later")
        run.history([(step, {"train/loss": 7.0}) for step in range(5)], missing=True)
        run.finish()
    (found,) = _runs(client := _client())
    assert found.info.status == "FINISHED"
    assert found.info.end_time >= found.info.start_time
    assert found.data.params["schedule.L"] == "4"
    assert found.data.params["noise.L"] == str(database.noise.L)
    assert found.data.tags["a"] == "b"
    assert _history(client, found, "train/loss") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 7.0), (4, 7.0)]
    assert len(_history(client, found, "nan")) == 3
    png, webp = sorted(_images(client, found), reverse=True)
    assert png.startswith("images/train~samples+step+2+timestamp+")
    assert (png[-4:], webp[-16:]) == (".png", "+compressed.webp")
    assert Path(client.download_artifacts(found.info.run_id, "sub/file.txt", str(workdir))).read_text() == "then"
    assert list(Path("runs/tracking").iterdir()) == []


def test_a_run_goes_on_until_it_is_finished(database):
    with pytest.raises(ZeroDivisionError), _track.run(database) as run:
        run.metrics({"a": 1}, 1)
        raise ZeroDivisionError
    (found,) = _runs(_client())
    assert found.info.status == "FAILED"
    with pytest.raises(KeyboardInterrupt), _track.run(database) as again:
        again.metrics({"a": 2}, 2)
        raise KeyboardInterrupt
    assert again.start == run.start
    (found,) = _runs(_client())
    assert found.info.status == "KILLED"
    with _track.run(database) as run:
        (found,) = _runs(_client())
        assert found.info.status == "RUNNING"
        run.finish()
    assert _history(_client(), found, "a") == [(1, 1.0), (2, 2.0)]
    with _track.run(database):
        pass
    assert len(_runs(_client())) == 2


def test_what_a_short_stage_logs_is_sent_by_the_next_one_or_when_it_fails(database):
    with _track.run(database, later=True) as run:
        run.metrics({"a": 1}, 1)
    assert _client().get_experiment_by_name("ncsn") is None
    with pytest.raises(ZeroDivisionError), _track.run(database, later=True) as run:
        run.metrics({"a": 2}, 2)
        raise ZeroDivisionError
    (found,) = _runs(_client())
    assert found.info.status == "FAILED"
    with _track.run(database, later=True) as run:
        run.metrics({"a": 3}, 3)
        run.image(np.zeros((4, 4), np.uint8), "samples", 3)
    with _track.run(database) as again:
        again.image(np.zeros((4, 4), np.uint8), "samples", 3)
        again.finish()
    (found,) = _runs(client := _client())
    assert found.info.status == "FINISHED"
    assert _history(client, found, "a") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert again.start == found.info.start_time
    assert len(_images(client, found)) == 2  # one, with its preview
    assert f"+timestamp+{found.info.start_time}+" in _images(client, found)[0]


def test_a_stage_that_turns_out_to_take_longer_sends_by_itself(database, monkeypatch):
    monkeypatch.setattr(_track, "SHORT", 0.1)
    with _track.run(database, later=True) as run:
        run.metrics({"a": 1}, 1)
        _wait(lambda: not _track._waits(Path(run.folder)))
        (found,) = _runs(client := _client())
        assert _history(client, found, "a") == [(1, 1.0)]
        run.metrics({"a": 2}, 2)
    assert _history(client, found, "a") == [(1, 1.0), (2, 2.0)]
    assert list(Path("runs/tracking").iterdir()) == []
    assert list(Path("runs/tracking").iterdir()) == []


def test_what_comes_afterwards_joins_the_run_of_the_weights_and_leaves_its_status(database):
    with _track.run(database) as run:
        run.trained("abc")
        run.finish()
    other = dataclasses.replace(database, evaluate=dataclasses.replace(database.evaluate, seed=5))
    with _track.run(other, afterwards="abc") as again:
        again.metrics({"a": 3}, 1)
    with pytest.raises(ZeroDivisionError), _track.run(database, afterwards="abc"):
        raise ZeroDivisionError
    (found,) = _runs(client := _client())
    assert (again.start, found.info.status) == (run.start, "FINISHED")
    assert _history(client, found, "a") == [(1, 3.0)]
    assert found.data.params["evaluate.seed"] == str(database.evaluate.seed)
    with _track.run(other) as run:  # of a graph that runs anew with the same network, and is not yet at its end
        run.trained("abc")
    with _track.run(database, afterwards="abc") as again:
        again.metrics({"a": 4}, 1)
    newest = max(_runs(client), key=lambda each: each.info.start_time)
    assert (newest.info.status, _history(client, newest, "a")) == ("RUNNING", [(1, 4.0)])
    for _ in range(2):  # where no run is of these weights there is one from then on
        with _track.run(database, afterwards="def"):
            pass
    assert len(_runs(client)) == 3


def test_other_parameters_make_another_run_and_where_it_runs_does_not(database):
    for changed in (
        database,
        dataclasses.replace(database, runtime=dataclasses.replace(database.runtime, workers=2)),
        dataclasses.replace(database, evaluate=dataclasses.replace(database.evaluate, seed=5)),
    ):
        with _track.run(changed):
            pass
    assert [run.data.params["evaluate.seed"] for run in _runs(_client())] == ["0", "5"]


def test_what_mlflow_never_takes_is_told_and_the_rest_arrives(database, caplog):
    with _track.run(database) as run:
        run.metrics({"before": 1, "no$name": 2, "after": 3})
        run.params({"noise": {"L": "another"}})
        with pytest.raises(ValueError, match="could not convert"):
            run.metrics({"a": "text"})
    (found,) = _runs(_client())
    assert found.data.metrics == {"before": 1, "after": 3}
    assert found.data.params["noise.L"] == str(database.noise.L)
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert ["no$name" in errors[0], "noise.L" in errors[1], len(errors)] == [True, True, 2]


def test_an_answer_that_is_lost_makes_nothing_arrive_twice(database, monkeypatch):
    monkeypatch.setattr(_track, "AGAIN", 0.01)
    log_batch, log_artifacts, lost = MlflowClient.log_batch, MlflowClient.log_artifacts, []

    def losing(call):
        def lose(*args, **kwargs):
            call(*args, **kwargs)
            if len(lost) % 2 == 0:
                lost.append(call)
                raise ConnectionError("lost")
            lost.append(None)

        return lose

    with _track.run(database) as run:
        monkeypatch.setattr(MlflowClient, "log_batch", losing(log_batch))
        monkeypatch.setattr(MlflowClient, "log_artifacts", losing(log_artifacts))
        for step in range(5):
            run.metrics({"a": step, "b": float("nan")}, step)
        run.image(np.zeros((4, 4, 3), np.uint8), "samples", 0)
        _wait(lambda: not _track._waits(Path(run.folder)))
    assert len(lost) >= 4
    (found,) = _runs(client := _client())
    assert _history(client, found, "a") == [(step, step) for step in range(5)]
    assert len(_history(client, found, "b")) == 5
    assert len(_images(client, found)) == 2


def test_a_run_is_a_plain_value_that_logs_from_elsewhere(database):
    with _track.run(database) as run:
        copy = pickle.loads(pickle.dumps(run))
        assert copy == run
        copy.metrics({"a": 1})
    assert _runs(_client())[0].data.metrics == {"a": 1}


def test_what_a_killed_process_left_is_sent_by_the_next_one(database, workdir):
    code = """if True:
        import os, sys
        from pipeline import _params, _track
        from pipeline.compose import compose
        _track._Courier.run = lambda self: None
        with _track.run(_params.parse(compose([]))) as run:
            run.metrics({"a": 1}, 1)
            os._exit(9)"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 9
    assert _runs(_client())[0].data.metrics == {}
    other = dataclasses.replace(database, evaluate=dataclasses.replace(database.evaluate, seed=5))
    with _track.run(other):
        pass
    first, _ = _runs(_client())
    assert first.data.metrics == {"a": 1}
    assert list(Path("runs/tracking").iterdir()) == []


def test_a_folder_that_others_look_into_can_be_removed(database):
    """Each process looks for what others have left behind, also while those make their folders and remove them."""
    over, spool = threading.Event(), Path("runs/tracking").resolve()

    def look():
        while not over.is_set():
            for folder in _track._folders(spool):
                if lock := _track._claim(folder):
                    lock.close()

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for k in range(300):
            with _track._make(spool / f"{k}"):
                (spool / f"{k}" / "run.json").touch()
                _track._remove(spool / f"{k}")
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert list(spool.iterdir()) == []


def test_the_machine_is_watched(database):
    with _track.run(database) as run:
        with run.system_metrics(interval=0.1):
            _wait(Path(run.folder, "waiting.jsonl").exists)
            time.sleep(0.3)
        assert "system metrics" not in [thread.name for thread in threading.enumerate()]
    (found,) = _runs(_client())
    assert 0 <= found.data.metrics["system/cpu_utilization_percentage"] <= 100
    assert found.data.metrics["system/system_memory_usage_megabytes"] > 0


def test_a_store_that_cannot_be_used_ends_in_one_line(database, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/none/mlflow.db")
    message = r"^MLflow at sqlite:.*: set MLFLOW_TRACKING_URI or runtime\.tracking_uri$"
    with pytest.raises(StageError, match=message), _track.run(database):
        pass
    assert "tracking" not in [thread.name for thread in threading.enumerate()]


def test_a_server_that_refuses_us_ends_in_one_line_without_the_password(database, monkeypatch):
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(403)
            self.end_headers()
            self.wfile.write(b"not you")

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://me:hidden@127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(StageError, match=r"403.*: set MLFLOW_TRACKING_URI") as raised, _track.run(database):
            pass
        server.shutdown()
    assert "hidden" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_server_that_hangs_slows_nothing_down(database, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(_track, "AGAIN", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with _track.run(database) as run:
            start = time.monotonic()
            for step in range(200):
                run.metrics({"a": step}, step)
            assert time.monotonic() - start < 1
            folder = run.folder
    first, last = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    where = f"runs/tracking/{Path(folder).name}"
    assert first.endswith(f": no answer; what is logged waits in {where}")
    assert last == f"202 entries and 0 artifacts wait for MLflow in {where}, for the next stage to send"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A tracking server that is not running yet."""
    server = s3.TrackingServer(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


STAGE = """
from pathlib import Path
from pipeline import _stage, _track

def main(params):
    with _track.run(params) as run:
        run.params({"schedule": {"L": 4}})
        run.artifact(Path("file.txt"))

_stage.run("stage", None, main)
"""


def test_a_server_that_is_away_stops_no_stage_and_gets_everything_later(server, workdir, params, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    # A whole stage while it is away: the exit status is that of the work, one line says what waits and where.
    Path("params.yaml").write_text(yaml.safe_dump(compose([])))
    Path("file.txt").touch()
    done = subprocess.run(
        [sys.executable, "-c", STAGE],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sum("artifacts wait for MLflow in runs/tracking/" in line for line in done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "Retrying" not in done.stderr

    monkeypatch.setattr(_track, "AGAIN", 0.2)
    with _track.run(params) as run:  # the same run, and still no server
        for step in range(3):
            run.metrics({"train/loss": step}, step)
        written = time.time() * 1000
        server.start()
        client = MlflowClient(server.uri)
        _wait(lambda: not _track._waits(Path(run.folder)))
        (found,) = _runs(client)
        assert found.data.params["schedule.L"] == "4"  # from the stage before
        assert _history(client, found, "train/loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
        assert client.get_metric_history(found.info.run_id, "train/loss")[0].timestamp <= written
        for step in range(3, 9):
            run.metrics({"train/loss": step}, step)
            if step == 5:
                server.stop(signal.SIGKILL)
            time.sleep(0.3)
        run.image(np.zeros((8, 8), np.uint8), "train/samples", 8)
        server.start()
        run.finish()
    (found,) = _runs(client)
    assert found.info.status == "FINISHED"
    assert _history(client, found, "train/loss") == [(step, float(step)) for step in range(9)]
    assert len(_images(client, found)) == 2
    assert {artifact.path for artifact in client.list_artifacts(found.info.run_id)} == {"images", "file.txt"}
    assert list(Path("runs/tracking").iterdir()) == []
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
