"""Training on nodes that share no file system, with an S3 server that goes away in between."""

import pickle
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from pipeline import _checkpoints, _params, _ray, s3
from pipeline._store import Bucket, store
from pipeline.compose import compose
from tests.clones import ROOT, environment, repository, run
from tests.stages import Cluster, Stage, alone, losses

pytestmark = pytest.mark.graph


STORAGE = f"runtime.storage={s3.STORAGE}"


def blind(*folders):
    """Behind this prefix a command sees nothing of the folders and of our code."""
    cover = " && ".join(f"mount -t tmpfs none {folder}" for folder in (*folders, ROOT / "ncsn", ROOT / "pipeline"))
    return "unshare", "--mount", "sh", "-c", f'{cover} && exec "$@"', "sh"


def test_wrong_credentials_end_it_before_anything_starts(inside, on_s3):
    wrong = on_s3.client | {"AWS_SECRET_ACCESS_KEY": "wrongwrongwrongwrong"}
    with Stage(inside, STORAGE, name="refused", **wrong) as stage:
        stage.ends(1)
    (line,) = stage.printed().strip().splitlines()
    assert line.startswith(f"error: storage {s3.STORAGE}")
    assert "access is refused" in line
    assert "AWS_SECRET_ACCESS_KEY" in line
    assert wrong["AWS_SECRET_ACCESS_KEY"] not in line
    assert wrong["AWS_ACCESS_KEY_ID"] not in line


@pytest.mark.parametrize("where", ["bucket", "folder"])
def test_data_too_large_for_the_object_store_is_mapped_from_a_copy_on_each_node(
    where, on_s3, monkeypatch, tmp_path, caplog
):
    caplog.set_level("INFO", "pipeline")
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    monkeypatch.setattr(_ray, "OBJECT_LIMIT", 0)
    monkeypatch.setattr(_ray, "_local_folder", lambda name: str(tmp_path / "node" / name))
    storage = s3.STORAGE if where == "bucket" else str(tmp_path / "shared")
    runtime = _params.parse(compose([f"runtime.storage={storage}"])).runtime
    x = np.random.default_rng(0).integers(0, 256, (5_000, 3, 32, 32), dtype=np.uint8)  # 15 MB: in parts
    np.save(tmp_path / "train.npy", x)
    handle = pickle.dumps(_ray.share(tmp_path / "train.npy", "digest", runtime))
    _ray.share(tmp_path / "train.npy", "digest", runtime)
    assert caplog.text.count("copying") == 1  # there already, the second time
    fetched = []
    fetch = Bucket.fetch
    monkeypatch.setattr(Bucket, "fetch", lambda self, *what: (fetched.append(what), fetch(self, *what)))
    with ThreadPoolExecutor(4) as workers:
        opened = list(workers.map(lambda _: pickle.loads(handle).open(), range(4)))
    assert len(fetched) == (where == "bucket")
    for array in opened:
        assert isinstance(array, np.memmap)
        assert not array.flags.writeable
        assert np.array_equal(array, x)


class Graph(Stage):
    """`dvc exp run` in a clone, likewise."""

    def __init__(self, folder, *settings, **variables):
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.command = ["dvc", "exp", "run", *(word for each in settings for word in ("-S", each))]
        self.environment = environment() | variables


@pytest.mark.root
def test_the_graph_runs_on_a_cluster_s3_and_a_tracking_server_by_their_addresses_alone(tmp_path, on_s3, monkeypatch):
    """Its workers see neither code nor data, as on machines of their own; S3 is killed in mid-training."""
    folder = repository(tmp_path / "clone")
    monkeypatch.chdir(folder)
    # a low rate, so that float summation does not grow into other curves
    settings = ["model=ncsnv2", "train.steps=80", "train.save_every=20", "train.learning_rate=1e-5", "train.warmup=0"]
    settings.append("train.preview_every=80")
    storage = f"s3://{s3.BUCKET}/graph"
    with s3.TrackingServer(tmp_path / "mlflow", objects=on_s3) as server, Cluster(cpus=0) as cluster:
        cluster.add(*blind(folder))
        ray = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
        variables = on_s3.client | {"MLFLOW_TRACKING_URI": server.uri} | ray
        done = run("dvc", "remote", "add", "--local", "-d", "bucket", f"s3://{s3.BUCKET}/dvc", cwd=folder)
        assert done.returncode == 0
        with Graph(folder, "experiment=tiny", f"runtime.storage={storage}", *settings, **variables) as graph:
            graph.trained(20)
            on_s3.stop(signal.SIGKILL)
            graph.told("trying again")
            on_s3.start()
            graph.ends()
        assert "well again" in graph.printed()
        assert on_s3.client["AWS_SECRET_ACCESS_KEY"] not in graph.printed()
        done = run("dvc", "push", "dvc.yaml", cwd=folder, **variables)
        assert done.returncode == 0, done.stdout
        client = MlflowClient(server.uri)
        (found,) = client.search_runs([client.get_experiment_by_name("ncsn").experiment_id])
        assert found.info.status == "FINISHED"
        assert found.info.artifact_uri.startswith("mlflow-artifacts:/")
        assert found.data.metrics["train/loss"] > 0
        assert found.data.metrics["eval/fid_digits_40"] > 0
    assert not list(folder.glob("runs/train-*"))
    assert _checkpoints.steps(graph.run) == [80, 60]
    torch.testing.assert_close(losses(graph.run), losses(alone(folder, "here", *settings)), rtol=1e-4, atol=0)
    names = store(f"s3://{s3.BUCKET}").names()
    assert any(name.startswith("graph/train-") and "/previews/" in name for name in names)
    assert any(name.startswith("mlflow/") and name.endswith("report.html") for name in names)
    weights = (folder / "out" / "train" / "ema.safetensors").read_bytes()
    shutil.rmtree(folder / "out")
    shutil.rmtree(folder / ".dvc" / "cache")
    done = run("dvc", "pull", "dvc.yaml", cwd=folder, **variables)
    assert done.returncode == 0, done.stdout
    assert (folder / "out" / "train" / "ema.safetensors").read_bytes() == weights
