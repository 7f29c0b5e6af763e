import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from ncsn.metrics import Moments, frechet_distance
from pipeline import _extractors, _fidelity, _reference, evaluate, features, prepare, s3, sample
from pipeline._params import Evaluate, Params
from pipeline._stage import StageError
from pipeline._store import read_json, sha256, store, write_json
from tests.pipeline.doubles import Pictures, Recorder

Compose = Callable[..., Params]
Passports = dict[str, dict[str, Any]]
N, N_UNTRAINED = 200, 50


def write_samples(kind: str, x: np.ndarray, *, size: int = 60, ranges: int = 1) -> None:
    """Shards and a manifest as the stage `sample` writes them."""
    folder = sample.OUT / kind
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for first in range(0, len(x), size):
        block = x[first : first + size]
        name = f"shard_{first:06d}_{first + len(block):06d}.npy"
        np.save(folder / name, block)
        shards.append({"file": name, "first": first, "last": first + len(block) - 1, "sha256": sha256(folder / name)})
    content = {
        "n": len(x) // ranges,
        "ranges": ranges,
        "selection": None,
        "shape": list(x.shape[1:]),
        "seed": 7,
        "weights": "ema" if kind == "ema" else "initial",
        "weights_sha256": kind * 8,
        "step": 600 if kind == "ema" else 0,
        "sampler": {"name": "annealed_langevin", "L": 4, "epsilon": 1e-5, "steps_per_level": 5, "denoise": True},
        "nfe": 21,
        "shards": shards,
        "sha256": "0" * 64,
    }
    write_json(folder / "manifest.json", content)


def noisy(x: np.ndarray, scale: float, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, scale, x.shape)
    return np.clip(x + noise, 0, 255).astype(np.uint8)


@dataclass
class Judged:
    """The folder in which all stages up to evaluate ran, what evaluate logged to MLflow, and to the terminal."""

    folder: Path
    recorder: Recorder
    text: str


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, compose_params: Compose, one_cluster: None) -> Judged:
    """Digits; the "samples" are training images with noise, those of the "untrained" network noise alone."""
    folder, recorder, lines = tmp_path_factory.mktemp("judged"), Recorder(), []
    params = compose_params()

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Lines()
    logger = logging.getLogger("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(evaluate._track, "run", recorder.run)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)  # which, unlike the attribute, undoes what loggers remember
        prepare.main(params)
        features.main(replace(params, features=replace(params.features, steps=150)))
        train = prepare.load("train")[0]
        write_samples("ema", noisy(train[: 2 * N], 20, 0), ranges=2)
        write_samples("untrained", noisy(np.zeros_like(train[:N_UNTRAINED]), 128, 1))
        evaluate.main(params)
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(handler)
    return Judged(folder, recorder, "\n".join(lines))


@pytest.fixture
def passports(judged: Judged, monkeypatch: pytest.MonkeyPatch) -> Passports:
    """By name; the folder is made the current one."""
    monkeypatch.chdir(judged.folder)
    content = read_json(evaluate.OUT / "passports.json")
    assert content["reason"] is None
    return {passport["name"]: passport for passport in content["passports"]}


def test_metrics_are_the_passports_numbers(passports: Passports, judged: Judged) -> None:
    metrics = read_json(evaluate.OUT / "metrics.json")
    assert metrics == {name: passport["value"] for name, passport in passports.items()}
    logged = {name: value for name, value in judged.recorder.values.items() if name.startswith("eval/")}
    assert logged == {f"eval/{name}": value for name, value in metrics.items()}
    expected = {
        f"{metric}_digits_{N}{suffix}"
        for metric in ("fid", "is", "kid", "precision", "recall")
        for suffix in ("", ".range_2", ".mean")
    }
    expected |= {
        f"{metric}_digits_{N_UNTRAINED}.{kind}"
        for metric in ("fid", "is", "kid", "precision", "recall")
        for kind in ("samples", "test", "blurred", "untrained")
    }
    expected |= {f"share_{digit}" for digit in range(10)}
    expected |= {f"{what}_difference" for what in ("mean", "std", "black", "white", "flat")}
    assert set(metrics) == expected | {"confident_fraction", "near_fraction_pixels", "near_fraction_features"}


def test_yardsticks_are_in_order(passports: Passports) -> None:
    def value(metric: str, kind: str) -> float:
        number: float = passports[f"{metric}_digits_{N_UNTRAINED}.{kind}"]["value"]
        return number

    for metric in ("fid", "kid"):
        assert value(metric, "test") < value(metric, "blurred") < value(metric, "untrained")
        assert value(metric, "test") < value(metric, "samples") < value(metric, "untrained")
    assert value("precision", "test") > 0.8
    assert value("precision", "untrained") < 0.2
    assert value("is", "test") > value("is", "untrained")


def test_fewer_images_have_a_larger_fid(passports: Passports) -> None:
    assert passports[f"fid_digits_{N}"]["value"] < passports[f"fid_digits_{N_UNTRAINED}.samples"]["value"]


def test_agrees_with_torch_fidelity_on_the_same_images(passports: Passports) -> None:
    extractor = _extractors.classifier()
    _fidelity.register(extractor.name)
    train, samples = prepare.load("train")[0], sample.load(sample.OUT / "ema")[:N]
    library = torch_fidelity.calculate_metrics(
        input1=Pictures(samples),
        input2=Pictures(train),
        feature_extractor=extractor.name,
        feature_extractor_weights_path=str(extractor.weights),
        cuda=torch.cuda.is_available(),
        batch_size=_extractors.BATCH,
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        isc_splits=10,
        kid_subset_size=N,
        prc_batch_size=1000,
        rng_seed=0,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    ours = {metric: passports[f"{metric}_digits_{N}"] for metric in ("fid", "is", "kid", "precision", "recall")}
    # The library averages in float32, which costs it the last digits of the mean: 1e-6 holds nevertheless.
    assert ours["fid"]["value"] == pytest.approx(library[torch_fidelity.KEY_METRIC_FID], rel=1e-6)
    # The classifier saw these images in other batches, whose float32 sums differ.
    assert ours["is"]["value"] == pytest.approx(library[torch_fidelity.KEY_METRIC_ISC_MEAN], rel=1e-6)
    assert ours["is"]["std"] == pytest.approx(library[torch_fidelity.KEY_METRIC_ISC_STD], rel=1e-6)
    assert ours["kid"]["value"] == pytest.approx(library[torch_fidelity.KEY_METRIC_KID_MEAN], rel=1e-6)
    assert ours["kid"]["std"] == pytest.approx(library[torch_fidelity.KEY_METRIC_KID_STD], rel=1e-6)
    assert ours["precision"]["value"] == library[torch_fidelity.KEY_METRIC_PRECISION]
    assert ours["recall"]["value"] == library[torch_fidelity.KEY_METRIC_RECALL]
    # Fed with float64 features, the library and we agree to more digits.
    a, b = (extractor.open()(x)["features"].double() for x in (samples, train))
    exact = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    exactly = frechet_distance(Moments.of(a), Moments.of(b))
    assert exactly == pytest.approx(exact[torch_fidelity.KEY_METRIC_FID], rel=1e-9)
    assert ours["fid"]["value"] == pytest.approx(exactly, rel=1e-6)


def test_a_passport_says_everything(passports: Passports) -> None:
    data, classifier = prepare.manifest(), features.manifest()
    headline = passports[f"kid_digits_{N}"]
    assert headline["std"] > 0
    assert len(headline["code"]["digest"]) == 64
    assert {key: headline[key] for key in headline if key not in ("value", "std", "code")} == {
        "name": f"kid_digits_{N}",
        "metric": "kid",
        "set": "samples",
        "n": N,
        "settings": {"kid_subsets": 100, "kid_subset_size": N, "seed": 0},
        "source": None,
        "seeds": {"seed": 7, "first": 0, "last": N - 1},
        "checkpoint": {"sha256": "ema" * 8, "step": 600, "weights": "ema", "selection": None},
        "sampler": sample.manifest(sample.OUT / "ema")["sampler"],
        "nfe": 21,
        "reference": {
            "data": "digits",
            "split": "train",
            "n": data["splits"]["train"]["n"],
            "sha256": data["splits"]["train"]["sha256"],
        },
        "extractor": {
            "name": "digits-classifier",
            "weights_sha256": classifier["sha256"],
            "test_accuracy": classifier["test_accuracy"],
            "layer": "features",
        },
        "preprocessing": "uint8, no resize, grey repeated to 3 channels",
        "rank_deficient": False,
    }
    part = passports[f"fid_digits_{N_UNTRAINED}.samples"]
    assert part["seeds"] == {"seed": 7, "first": 0, "last": N_UNTRAINED - 1}
    assert part["rank_deficient"]  # 50 images, 64 features
    test = passports[f"is_digits_{N_UNTRAINED}.test"]
    assert (test["checkpoint"], test["sampler"], test["seeds"], test["nfe"]) == (None, None, None, None)
    assert test["source"] == f"{N_UNTRAINED} of {data['splits']['test']['n']} test images, drawn by seed 0"
    assert test["extractor"]["layer"] == "logits"
    assert passports[f"fid_digits_{N_UNTRAINED}.untrained"]["checkpoint"]["weights"] == "initial"
    assert "Gaussian blur of 0.5 pixels" in passports[f"fid_digits_{N_UNTRAINED}.blurred"]["source"]
    assert passports["mean_difference"]["extractor"] is None


def test_class_shares(passports: Passports) -> None:
    assert sum(passports[f"share_{digit}"]["value"] for digit in range(10)) == pytest.approx(1)
    assert 0 < passports["confident_fraction"]["value"] <= 1


def test_the_table_has_a_line_for_each_set(judged: Judged) -> None:
    start = judged.text.index("set ")
    lines = [line.split() for line in judged.text[start:].splitlines()][:9]
    assert [line[:2] for line in lines] == [
        ["set", "n"],
        ["samples", str(N)],
        ["range_2", str(N)],
        *([kind, str(N_UNTRAINED)] for kind in ("samples", "test", "blurred", "untrained")),
        ["mean", str(N)],
        ["spread", str(N)],
    ]
    assert all(len(line) == 7 for line in lines)


def test_ranges_are_judged_each_and_together(passports: Passports) -> None:
    extractor, rows = _extractors.classifier(), _extractors.classifier().open()(prepare.load("train")[0])["features"]
    second = extractor.open()(sample.load()[N:])["features"]
    expected = frechet_distance(Moments.of(second), Moments.of(rows))
    name = f"fid_digits_{N}"
    one, two, mean = (passports[f"{name}{suffix}"] for suffix in ("", ".range_2", ".mean"))
    assert two["value"] == pytest.approx(expected, rel=1e-6)
    assert (one["seeds"]["first"], one["seeds"]["last"]) == (0, N - 1)
    assert (two["seeds"]["first"], two["seeds"]["last"]) == (N, 2 * N - 1)
    assert (mean["seeds"]["first"], mean["seeds"]["last"]) == (0, 2 * N - 1)
    assert mean["value"] == pytest.approx((one["value"] + two["value"]) / 2)
    assert mean["std"] == pytest.approx(abs(one["value"] - two["value"]) / 2**0.5)
    assert mean["settings"] == {"ranges": 2, "values": [one["value"], two["value"]]}
    assert (mean["n"], two["set"], mean["set"]) == (N, "range_2", "mean")


def test_training_features_are_kept_and_used_again(
    passports: Passports, compose_params: Compose, caplog: pytest.LogCaptureFixture
) -> None:
    runtime, extractor = compose_params().runtime, _extractors.classifier()
    where = _reference.place(extractor, runtime)
    found = _reference.read(where, 0)
    assert found is not None
    rows = extractor.open()(prepare.load("train")[0])["features"]
    assert torch.equal(found.features, rows)
    torch.testing.assert_close(found.moments.cov, Moments.of(rows).cov, rtol=1e-9, atol=1e-12)
    assert found.index.tolist() == list(range(len(rows)))
    content = where.read(_reference.FEATURES)
    where.write(_reference.FEATURES, content[:-1] + bytes([content[-1] ^ 1]))
    assert _reference.read(where, 0) is None
    assert "are damaged and computed anew" in caplog.text
    _reference.write(where, found)
    assert _reference.read(where, 0) is not None
    where.remove(_reference.META)
    assert _reference.read(where, 0) is None
    _reference.write(where, found)
    assert _reference.place(replace(extractor, sha256="0" * 64), runtime) != where


def test_training_features_are_kept_on_s3(passports: Passports, on_s3: Any) -> None:
    where = store(s3.STORAGE) / "reference"
    rows = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    _reference.write(where, _reference.Reference.of(rows, 3))
    found = _reference.read(where, 3)
    assert found is not None
    assert torch.equal(found.features, rows)
    assert torch.equal(found.moments.scatter, Moments.of(rows).scatter)


def test_what_is_written_about_neighbours(passports: Passports) -> None:
    found = read_json(evaluate.OUT / "neighbours.json")
    assert set(found) == {"pixels", "features"}
    for space, finding in found.items():
        assert passports[f"near_fraction_{space}"]["value"] == finding["near"]
        assert len(finding["samples"]["nearest"]) == 2 * N
    # the samples are training images with a little noise
    assert passports["near_fraction_pixels"]["value"] > 0.05
    assert found["pixels"]["samples"]["index"][3][0] == 3
    for name in ("neighbours", "distances"):
        assert Image.open(evaluate.OUT / f"{name}.png").width > 500
    table = read_json(evaluate.OUT / "table.json")
    assert table["columns"][:3] == ["set", "n", "fid"]
    assert ["samples", N, passports[f"fid_digits_{N}"]["value"]] == table["data"][0][:3]


@pytest.mark.usefixtures("passports")
def test_identical_sets_have_no_distance() -> None:
    extractor = _extractors.classifier()
    layers = extractor.open()(prepare.load("train")[0])
    same = evaluate.distances(layers, extractor, _reference.Reference.of(layers["features"], 0), 0)
    values = {score.metric: score.value for score in same}
    assert 0 <= values["fid"] < 1e-3
    assert values["kid"] < 1e-3  # an unbiased estimate: below 0, as an image is no stranger to itself
    assert values["precision"] == values["recall"] == 1


@pytest.mark.usefixtures("passports")
def test_few_images_are_judged_too() -> None:
    extractor = _extractors.classifier()
    rows = extractor.open()(prepare.load("train")[0])
    few = {layer: values[: evaluate.LEAST_IMAGES] for layer, values in rows.items()}
    scores = evaluate.distances(few, extractor, _reference.Reference.of(rows["features"], 0), 0)
    assert all(np.isfinite(score.value) for score in scores)


@pytest.mark.usefixtures("passports")
def test_a_number_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(StageError, match=r"fid_x is nan: expected a finite number; look at the images of the set 'a'"):
        evaluate.passport("fid_x", evaluate.Score("fid", float("nan")), "a", 9, evaluate.ImageSet(np.empty(0)), {})


@pytest.mark.usefixtures("passports")
def test_samples_of_another_shape_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepare.manifest() | {"shape": [3, 8, 8]}
    monkeypatch.setattr(prepare, "manifest", lambda: data)
    with pytest.raises(StageError, match=r"the samples have shape \[1, 8, 8\], the data \[3, 8, 8\]: draw them anew"):
        evaluate.image_sets(0)
    with pytest.raises(StageError, match="out/features is of another data set than digits"):
        _extractors.choose(Evaluate("auto", None, 0))


def test_too_few_images_are_an_error() -> None:
    with pytest.raises(StageError, match=r"out/samples/ema holds 3 images: expected at least 4; raise sample.n"):
        evaluate.check_sizes({"the test set": 9, "out/samples/ema": 3})


@pytest.fixture
def unlabelled(workdir: Path, compose_params: Compose, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Patches, and a torch home without Inception's weights."""
    monkeypatch.setenv("TORCH_HOME", str(workdir / "torch"))
    params = compose_params("data=patches", "data.resolution=64")
    prepare.main(params)
    features.main(params)
    data = prepare.load("train")[0]
    write_samples("ema", noisy(data[:20], 20, 0))
    write_samples("untrained", noisy(data[:20], 128, 0))
    return params


def test_without_labels_and_inception_it_says_so(unlabelled: Params, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pipeline"):
        evaluate.main(unlabelled)
    assert read_json(evaluate.OUT / "metrics.json") == {}
    content = read_json(evaluate.OUT / "passports.json")
    assert content["passports"] == []
    assert content["reason"].startswith("nothing was measured: patches has no labels to train a classifier on")
    assert "evaluate.inception_weights=PATH" in content["reason"]
    assert content["reason"] in caplog.text
    assert set(read_json(evaluate.OUT / "neighbours.json")) == {"pixels"}


@pytest.mark.usefixtures("unlabelled")
def test_an_extractor_that_cannot_be_had_is_an_error(workdir: Path) -> None:
    with pytest.raises(StageError, match=r"evaluate.extractor='classifier': the data set has no labels"):
        _extractors.choose(Evaluate("classifier", None, 0))
    place = workdir / "torch/hub/checkpoints" / _extractors.INCEPTION_FILE
    message = f"the Inception weights {place} do not exist: get them with .*fetch`, put https://.* there, or name"
    with pytest.raises(StageError, match=message):
        _extractors.choose(Evaluate("inception-v3-compat", None, 0))
    # A file that somebody named and that is not there is an error even where auto would do without.
    with pytest.raises(StageError, match=f"the Inception weights {workdir / 'mine.pth'} do not exist"):
        _extractors.choose(Evaluate("auto", str(workdir / "mine.pth"), 0))


@pytest.mark.usefixtures("unlabelled")
def test_other_inception_weights_are_not_opened(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workdir / "torch/hub/checkpoints" / _extractors.INCEPTION_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(b"a pickle")
    for settings in (Evaluate("auto", None, 0), Evaluate("inception-v3-compat", str(path), 0)):
        with pytest.raises(StageError, match=f"{sha256(path)}, expected one that begins with 6726825d: it is not the"):
            _extractors.choose(settings)
    monkeypatch.setattr(_extractors, "INCEPTION_SHA256", sha256(path)[:8])
    extractor = _extractors.choose(Evaluate("auto", None, 0))
    assert extractor is not None
    assert (extractor.name, extractor.short, extractor.sha256) == ("inception-v3-compat", "inception", sha256(path))
    assert (extractor.layer("fid"), extractor.layer("isc")) == ("2048", "logits_unbiased")


def test_tones_that_differ_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    x = np.random.default_rng(0).integers(0, 200, (2500, 3, 4, 4), dtype=np.uint8)
    shifted = x + np.array([0, 51, 0], dtype=np.uint8)[:, None, None]
    with caplog.at_level(logging.WARNING, "pipeline"):
        scores = {score.metric: score.value for score in evaluate.channel_differences(shifted, x)}
    assert scores["mean_difference_green"] == pytest.approx(0.2, abs=1e-12)
    assert scores["std_difference_green"] == pytest.approx(0, abs=1e-12)
    assert scores["mean_difference_red"] == 0
    assert caplog.text.count("the samples' tones are not the data's") == 1
    assert "mean_difference_green = +0.200: more than 0.05" in caplog.text


def test_saturated_and_flat_images_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    data = np.random.default_rng(0).integers(1, 255, (2500, 1, 4, 4), dtype=np.uint8)
    x = data.copy()
    x[:, :, 0, 0] = 255
    x[:100] = 7
    with caplog.at_level(logging.WARNING, "pipeline"):
        scores = {score.metric: score.value for score in evaluate.health(x, data)}
    assert scores == {
        "black_difference": 0,
        "white_difference": pytest.approx(2400 / 2500 / 16),
        "flat_difference": pytest.approx(100 / 2500),
    }
    assert "white_difference = +0.060: the share of pixels that are 255 exceeds the data's by more than 0.05" in (
        caplog.text
    )
    assert "flat_difference = +0.040: the share of images without contrast" in caplog.text
    assert "black" not in caplog.text
    caplog.clear()
    evaluate.health(data, x)  # fewer than the data has
    assert not caplog.text


def test_mean_and_deviation_are_numpys() -> None:
    x = np.random.default_rng(0).integers(0, 256, (2500, 3, 3), dtype=np.uint8)
    assert evaluate.mean_and_std(x) == pytest.approx((np.mean(x / 255), np.std(x / 255)), rel=1e-12)


def test_the_blur_keeps_flat_images_and_flattens_others() -> None:
    flat = np.full((2, 3, 32, 32), 77, dtype=np.uint8)
    np.testing.assert_array_equal(evaluate.blur(flat), flat)
    checks = np.indices((1, 1, 32, 32)).sum(axis=0).astype(np.uint8) % 2 * 255
    assert evaluate.blur(checks).std() < 0.1 * checks.std()
    dot = np.zeros((1, 1, 33, 33), dtype=np.uint8)
    dot[0, 0, 16, 16] = 255
    sigma = evaluate.blur_sigma(33)
    assert evaluate.blur(dot)[0, 0, 16, 16] == round(255 / (2 * np.pi * sigma**2))


def test_drawn_rows_are_distinct_and_the_seeds() -> None:
    rows = _reference.draw(100, 30, 3)
    assert len(set(rows.tolist())) == 30
    np.testing.assert_array_equal(rows, _reference.draw(100, 30, 3))
    assert rows.tolist() != _reference.draw(100, 30, 4).tolist()
    assert _reference.draw(5, 30, 0).tolist() == [0, 1, 2, 3, 4]


def test_names() -> None:
    assert [evaluate.thousands(n) for n in (360, 1000, 1500, 50_000)] == ["360", "1k", "1500", "50k"]
    extractor = _extractors.Extractor("digits-classifier", Path("x"), "0", classes=["T-shirt/top", "a(b", "a)b"])
    names = [score.metric for score in evaluate.class_views({"logits": torch.eye(3)}, extractor)]
    assert names == ["confident_fraction", "share_0_T-shirt_top", "share_1_a_b", "share_2_a_b"]
