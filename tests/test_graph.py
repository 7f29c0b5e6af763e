"""The whole graph in a clone of this repository: real DVC, real Ray processes, a real MLflow store."""

import csv
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from pipeline import _params, sample
from pipeline._store import read_json
from tests.clones import ROOT, repository, run

TINY = ["-S", "experiment=tiny", "-S", "runtime.workers=2"]

pytestmark = pytest.mark.graph


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A repository in which the tiny graph has been run by two Ray workers."""
    folder = repository(tmp_path_factory.mktemp("clone"))
    done = run("dvc", "exp", "run", *TINY, cwd=folder)
    assert done.returncode == 0, done.stdout
    return folder


def _runs(clone):
    client = MlflowClient(f"sqlite:///{clone}/mlflow.db")
    experiment = client.get_experiment_by_name("ncsn")
    return client, client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])


def _losses(path):
    with open(path) as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_the_graph_leaves_its_outputs(inside):
    params = _params.load()
    assert params.runtime.workers == 2
    assert sample.load().shape == (params.sample.n, 1, 8, 8)
    assert sample.manifest()["weights"] == "ema"
    metrics = read_json(Path("out/evaluate/metrics.json"))
    assert all(np.isfinite(value) for value in metrics.values())
    assert f"fid_digits_{params.sample.n}" in metrics
    page = Path("out/report.html").read_text()
    assert f"{metrics[f'fid_digits_{params.sample.n}']:.4g}"[:4] in page
    assert not list(Path("out").rglob("*.part"))


def test_the_stages_shared_one_finishedrun(clone):
    client, runs = _runs(clone)
    first = runs[0]
    assert first.info.status == "FINISHED"
    assert first.data.params["noise.L"] == "4"
    assert "schedule.epsilon" in first.data.params
    assert any(name.startswith("eval/fid_digits_40") for name in first.data.metrics)
    assert len(client.get_metric_history(first.info.run_id, "train/loss")) == 6
    assert any(key.startswith("dvc.") for key in first.data.tags)
    assert first.data.tags["mlflow.source.git.commit"]
    top = {artifact.path for artifact in client.list_artifacts(first.info.run_id)}
    assert {"report.html", "samples"} <= top


def test_nothing_changed_means_nothing_runs(clone):
    before = len(_runs(clone)[1])
    done = run("dvc", "repro", cwd=clone)
    assert done.returncode == 0
    assert "up to date" in done.stdout
    assert len(_runs(clone)[1]) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=abc", "train.batch_size='abc': expected a whole number >= 1"),
        ("train.batchsize=3", "train.batchsize=3: unknown key, allowed are steps, batch_size"),
        ("+train.batchsize=3", "train.batchsize=3: unknown key, allowed are steps, batch_size"),
        ("trian.steps=3", "trian.steps=3: unknown key, allowed are data, model"),
        (
            "data=nonesuch",
            "Could not find 'data/nonesuch' Available options in 'data': celeba32 celeba64 cifar10 digits",
        ),
    ],
)
def test_a_bad_override_ends_in_one_line_that_says_what_is_allowed(clone, override, message):
    before = (clone / "params.yaml").read_text()
    done = run("dvc", "exp", "run", *TINY, "-S", override, cwd=clone)
    assert done.returncode != 0
    (line,) = done.stdout.strip().splitlines()
    assert line.startswith("ERROR: ")
    assert message in line
    assert (clone / "params.yaml").read_text() == before


def test_other_params_make_a_second_run_to_compare(clone):
    done = run("dvc", "exp", "run", *TINY, "-S", "evaluate.seed=1", cwd=clone)
    assert done.returncode == 0
    assert "Running stage 'sample'" not in done.stdout
    client, runs = _runs(clone)
    first, second = runs[0], runs[-1]
    assert first.info.run_id != second.info.run_id
    assert second.info.status == "FINISHED"
    assert second.data.params["evaluate.seed"] == "1"
    missing = set(first.data.metrics) - set(second.data.metrics)  # what was seen while the stages ran that now did not
    assert {name.split("/")[0] for name in missing} <= {"sample", "system", "train", "train_level"}
    assert "train/loss" not in missing
    assert len(client.get_metric_history(second.info.run_id, "train/loss")) == 6


def test_an_official_checkpoint_is_drawn_from_and_judged_in_place_of_training(tmp_path):
    folder, pictures = repository(tmp_path / "clone"), tmp_path / "pictures"
    generator = np.random.default_rng(0)
    for split, label, n in itertools.product(("train", "test"), ("dark", "light"), (12,)):
        (pictures / split / label).mkdir(parents=True)
        for k in range(n):
            pixels = generator.integers(0, 100, (16, 16, 3)) + (150 if label == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(pictures / split / label / f"{k}.png")
    data = ["data=image_folder", f"data.root={pictures}", "data.resolution=16", "features.steps=20", "sample.n=16"]
    network = ["model=ncsnv2", "model.width=8", "model.act=elu", "noise=ncsn", "noise.steps_per_level=2"]
    file = str(ROOT / "tests" / "golden" / "ncsnv2_checkpoint_4.pth")
    for command in (
        [sys.executable, "-m", "pipeline.compose", *data, *network],
        ["dvc", "repro", "schedule", "features"],
        [sys.executable, "-m", "pipeline.fetch", "--checkpoint", file],
        ["dvc", "commit", "-f", "train"],
        ["dvc", "repro"],
    ):
        done = run(*command, cwd=folder)
        assert done.returncode == 0, done.stdout
    assert "Running stage 'evaluate'" in done.stdout
    assert "Running stage 'train'" not in done.stdout
    model = read_json(folder / "out" / "train" / "model.json")
    assert model["source"]["file"] == "ncsnv2_checkpoint_4.pth"
    assert sample.manifest(folder / "out" / "samples" / "ema")["weights_sha256"] == model["sha256"]["ema"]
    metrics = read_json(folder / "out" / "evaluate" / "metrics.json")
    assert metrics["fid_image_folder_16"] > 0
    assert "ncsnv2_checkpoint_4.pth" in (folder / "out" / "report.html").read_text()
