"""The estimate: what it multiplies, what it says, that it leaves no trace. How true it is: docs/performance.md."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from pipeline import estimate, features, prepare, schedule
from pipeline._stage import StageError
from pipeline._store import sha256, write_json


@pytest.fixture
def prepared(compose_params, workdir, monkeypatch):
    """A folder with tiny data and its schedule; all is timed in this process, as briefly as can be."""
    monkeypatch.setattr(estimate, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(estimate, "_apart", lambda function, params, times=1: [function(params)] * times)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)

    def prepare_for(*overrides):
        params = compose_params("experiment=tiny", *overrides)
        prepare.main(params)
        write_json(schedule.OUT / "schedule.json", schedule.choose(params.noise, torch.from_numpy(_digits()) / 255))
        return params

    return prepare_for


def _digits():
    return np.round(load_digits().images * (255 / 16)).astype(np.uint8)[:, None]


def _files():
    return {str(path) for path in Path().rglob("*")}


def test_what_has_to_run_first_is_named(params, workdir):
    with pytest.raises(StageError, match=r"out/data/manifest.json does not exist: .*dvc repro prepare"):
        estimate.main(params)
    prepare.main(params)
    with pytest.raises(StageError, match=r"out/schedule/schedule.json does not exist: .*dvc repro schedule"):
        estimate.main(params)


def test_rows_multiply_what_was_timed_and_nothing_is_left_behind(prepared, capsys):
    params = prepared()
    params = dataclasses.replace(params, runtime=dataclasses.replace(params.runtime, workers=4))
    before = _files()
    estimate.main(params, as_json=True)
    assert _files() == before
    found = json.loads(capsys.readouterr().out)
    training, drawing = found["timed"]["training"], found["timed"]["drawing"]
    train, some, many = found["rows"]
    assert train["what"] == "train: 12 steps of 16"
    beside = 4 * training["save"] + training["preview"]  # at steps 0, 4, 8 and 12; at step 12
    assert train["one"] == pytest.approx(12 * training["step"] + beside)
    assert train["all"] == pytest.approx(3 * training["step"] + beside)
    assert found["images_per_second"] == pytest.approx(16 / training["step"])
    shard = 9 * drawing["step"]  # 4 levels of 2 steps, and the denoising step
    slots = drawing["slots"]
    assert some["one"] == pytest.approx(-(-6 // slots) * shard)  # 3 shards of 16, 16 and 8 images, twice
    assert many["what"] == "sample: 50,000 images, NFE 9"
    assert many["all"] == pytest.approx(-(-(50_000 // 16 + 3) // (4 * slots)) * shard)
    assert found["not_evaluated"] == "out/features/classifier.json does not exist: write it with `dvc repro features`"
    parameters = 31_457
    # model, average, Adam's two moments, in float32; beside them names, counters and curves
    assert 16 * parameters < found["checkpoint"]["bytes"] < 16 * parameters + 50_000
    assert found["checkpoint"]["kept"] == 4
    assert min(training["peak"], drawing["peak"]) > 10**8  # torch alone
    text = estimate.table(found)
    assert "never wait" in text
    assert "4 workers" in text
    assert "evaluate: out/features/classifier.json does not exist" in text


def test_selecting_a_checkpoint_is_counted(prepared):
    params = prepared("select.rule=fid", "select.n=40", "train.steps=10", "sample.method=consistent")
    found = estimate.estimate(params)
    _, select, some, _ = found["rows"]
    assert select["what"] == "select: 3 times 40 images"  # of steps 4, 8 and 10
    assert found["checkpoint"]["kept"] == 4
    assert some["what"] == "sample: 40 images, NFE 7"  # 3 levels below the first, of 2 steps, and the denoising step
    shards, slots = 9, found["timed"]["drawing"]["slots"]
    assert select["one"] == pytest.approx(-(-shards // slots) * 7 * found["timed"]["drawing"]["step"])


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (("train.steps=40",), 3),  # the last two and the best
        (("train.steps=40", "train.keep_every=8"), 7),  # 8, 16, 24, 32, 40, 36 and the best
        (("train.steps=41", "train.keep_every=4"), 11),  # all, and the last
        (("train.steps=3",), 1),
    ],
)
def test_checkpoints_that_stay_are_counted(compose_params, overrides, count):
    assert estimate.kept_at_the_end(compose_params("experiment=tiny", "runtime.keep=2", *overrides)) == count


@pytest.mark.parametrize("overrides", [("model=ncsn",), ("train.space=logits",), ("loss=ssm_vr",)], ids=str)
def test_other_networks_spaces_and_losses_are_timed(prepared, overrides):
    params = prepared(*overrides)
    assert estimate.time_training(params).micro_batch == 16
    assert estimate.time_drawing(params).step > 0


def test_judging_is_timed_with_the_classifier_of_the_data(prepared):
    params = prepared()
    features.OUT.mkdir(parents=True)
    weights = features.OUT / "classifier.safetensors"
    classes = [str(k) for k in range(10)]
    save_file(features.Classifier([1, 8, 8], 10).state_dict(), weights)
    info = {"extractor": "digits-classifier", "labelled": True, "shape": [1, 8, 8], "classes": classes}
    write_json(features.OUT / "classifier.json", info | {"test_accuracy": 0.1, "sha256": sha256(weights)})
    found = estimate.estimate(params)
    assert [row["what"] for row in found["rows"][3:]] == ["evaluate: 40 images", "evaluate: 50,000 images"]
    assert found["rows"][3]["one"] < found["rows"][4]["one"]
    assert found["not_evaluated"] is None


def test_metrics_take_what_they_were_timed_at_and_pairs_more():
    judging = estimate.Judging(image=0.01, metrics=2.0, pair=1e-6, peak=0)
    rows = estimate.ROWS
    # five sets of as many rows as were timed
    assert estimate.judged(judging, rows, rows, rows) == pytest.approx(0.01 * 5 * rows + 5 * 2.0)
    more = estimate.judged(judging, 50_000, rows, rows) - estimate.judged(judging, rows, rows, rows)
    assert more == pytest.approx(0.01 * 49_000 + 1e-6 * (51_000**2 - 2_000**2))
    assert estimate.judged(judging, 10, 10, 10) >= 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3.0 s"), (119, "119.0 s"), (130, "2.2 min"), (9000, "2.5 h"), (2e5, "2.3 days")]
)
def test_durations_are_told_in_the_unit_that_suits(seconds, text):
    assert estimate.duration(seconds) == text


def test_what_is_timed_apart_has_memory_of_its_own_and_a_kill_is_told():
    found = estimate._apart(eval, "__import__('os').getpid()", times=2)
    assert len({*found, os.getpid()}) == 3
    with pytest.raises(StageError, match=r"eval was killed, as happens when memory runs out: set train.micro_batch"):
        estimate._apart(eval, "__import__('os').kill(__import__('os').getpid(), 9)")
