import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from pipeline import _extractors, _page, evaluate, features, prepare, report, sample, schedule, train
from pipeline._params import METHODS, Params
from pipeline._pictures import grid_picture, save_gif, save_png
from pipeline._stage import StageError
from pipeline._store import read_json, replacing_folder, sha256, write_json, write_text

Compose = Callable[..., Params]
N, N_EQUAL, STEPS = 200, 50, 600
LOCK = """
schema: '2.0'
stages:
  prepare:
    cmd: python -m pipeline.prepare
    outs:
    - {path: out/data, hash: md5, md5: 0123abcd.dir, size: 1, nfiles: 5}
  report:
    cmd: python -m pipeline.report
    outs:
    - {path: out/report.html, hash: md5, md5: deadbeef, size: 1}
"""


@dataclass
class Recorder:
    """Stands in for an MLflow run, whose database takes seconds to make."""

    values: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def run(self, params: Params, later: bool = False) -> Iterator["Recorder"]:
        yield self

    def params(self, values: dict[str, Any]) -> None:
        self.values |= values

    metrics = tags = params

    def history(self, rows: list[tuple[int, dict[str, float]]], missing: bool) -> None:
        assert missing, "what the stage has logged, logged again"
        self.values["history"] = rows

    def image(self, pixels: np.ndarray, key: str, step: int) -> None:
        self.values[key] = (pixels.shape, step)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        assert path.exists()
        self.values[str(path)] = folder

    def tables(self, *paths: str) -> None:
        self.values["tables"] = paths

    def trained(self, weights: str) -> None:
        self.values["weights"] = weights

    def finish(self) -> None:
        self.values["finished"] = True


def write_outputs(params: Params) -> None:
    """What all stages write, of digits or patches; the "samples" are training images with noise."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule._track, "run", recorder.run)
        prepare.main(params)
        schedule.main(params)
    write_training(params)
    write_samples()
    write_features()
    write_evaluation()


def write_training(params: Params) -> None:
    data, levels = prepare.manifest(), schedule.load()
    steps = torch.arange(20, STEPS + 1, 20, dtype=torch.float64)
    sigmas = torch.tensor(levels["sigmas"], dtype=torch.float64)
    level = levels["dim"] / 2 * (0.1 + 1 / (1 + 10 * sigmas))[None] * (0.3 + 0.7 * torch.exp(-steps / 80))[:, None]
    level *= 1 + 0.1 * torch.sin(torch.arange(level.numel()).reshape(level.shape) * 2.3)
    level[0, 3] = torch.nan  # a level without a sample
    with replacing_folder(train.OUT) as out:
        train.write_curves(torch.cat([steps[:, None], level.nanmean(1, keepdim=True), level], 1), out)
        content = {
            "network": {"name": "ncsnv2", "channels": data["shape"][0], "width": params.model.width, "act": "elu"},
            "step": STEPS,
            "parameters": 123_456,
            "ema_decay": 0.99,
            "seed": 0,
            "fingerprint": "0" * 12,
            "sha256": {"ema": "e" * 64, "initial": "1" * 64},
        }
        write_json(out / "model.json", content)


def write_samples() -> None:
    data, levels = prepare.load("train")[0], schedule.load()
    rng = np.random.default_rng(0)
    drawn = {"ema": rng.permutation(data)[:N], "untrained": np.zeros_like(data[:N_EQUAL])}
    with replacing_folder(sample.OUT) as out:
        for (kind, x), scale in zip(drawn.items(), (12, 128), strict=True):
            drawn[kind] = x = np.clip(x + rng.normal(0, scale, x.shape), 0, 255).astype(np.uint8)
            (out / kind).mkdir()
            np.save(out / kind / "shard.npy", x)
            shard = {"file": "shard.npy", "first": 0, "last": len(x) - 1, "sha256": sha256(out / kind / "shard.npy")}
            content = {
                "n": len(x),
                "ranges": 1,
                "selection": None,
                "shape": list(x.shape[1:]),
                "seed": 7,
                "weights": "ema" if kind == "ema" else "initial",
                "weights_sha256": "e" * 64,
                "step": STEPS if kind == "ema" else 0,
                "sampler": {"name": "annealed_langevin", "L": levels["L"], "denoise": True},
                "nfe": 5 * levels["L"] + 1,
                "shards": [shard],
                "sha256": "5" * 64,
            }
            write_json(out / kind / "manifest.json", content)
        x = torch.from_numpy(drawn["ema"])
        save_png(grid_picture(x[:100], 10), out / "grid.png")
        save_gif([grey_out(x[:25], k / 5) for k in range(6)], 5, out / "denoising.gif")


def grey_out(x: torch.Tensor, share: float) -> torch.Tensor:
    return (x * share + 128 * (1 - share)).to(torch.uint8)


def write_features() -> None:
    data = prepare.manifest()
    content = {"labelled": False}
    if data["classes"] is not None:
        content = {
            "labelled": True,
            "extractor": f"{data['name']}-classifier",
            "shape": data["shape"],
            "classes": data["classes"],
            "feature_dim": 64,
            "test_accuracy": 0.9861,
            "steps": 300,
            "sha256": "c" * 64,
        }
    write_json(features.OUT / "classifier.json", content)


def write_evaluation() -> None:
    data = prepare.manifest()
    with replacing_folder(evaluate.OUT) as out:
        if data["classes"] is None:
            evaluate.write(out, [], f"nothing was measured: {data['name']} has no labels")
        else:
            evaluate.write(out, judged(data))
        finding = evaluate.pixel_neighbours(evaluate.image_sets(0))
        evaluate.illustrate([finding], out, 0)


def judged(data: dict[str, Any]) -> list[evaluate.Passport]:
    extractor = _extractors.Extractor(
        f"{data['name']}-classifier", Path("unused"), "c" * 64, test_accuracy=0.9861, classes=data["classes"]
    )
    common = evaluate.provenance(extractor)
    images = {kind: evaluate.ImageSet(np.empty(0), sample.manifest(sample.OUT / kind)) for kind in ("ema", "untrained")}
    sets = {
        "samples": images["ema"],
        "test": evaluate.ImageSet(np.empty(0), source=f"{N_EQUAL} of 360 test images, drawn by seed 0"),
        "blurred": evaluate.ImageSet(np.empty(0), source=f"{N_EQUAL} of 360 test images, Gaussian blur of 1 pixels"),
        "untrained": images["untrained"],
    }
    passports = []
    for scale, kind, n, suffix in [
        (5.0, "samples", N, ""),
        (6.0, "samples", N_EQUAL, ".samples"),
        (1.0, "test", N_EQUAL, ".test"),
        (30.0, "blurred", N_EQUAL, ".blurred"),
        (900.0, "untrained", N_EQUAL, ".untrained"),
    ]:
        for score in (
            evaluate.Score("fid", 10.433 * scale, None, "features"),
            evaluate.Score("is", 1 + 8 / scale, 0.1234, "logits", {"isc_splits": 10, "seed": 0}),
            evaluate.Score("kid", 0.0123 * scale - 0.013, 0.002, "features", {"kid_subsets": 100, "seed": 0}),
            evaluate.Score("precision", 0.95 / scale, None, "features", {"prc_neighborhood": 3}),
            evaluate.Score("recall", 0.85 / scale, None, "features", {"prc_neighborhood": 3}),
        ):
            name = f"{score.metric}_{extractor.short}_{n}{suffix}"
            passports.append(evaluate.passport(name, score, kind, n, sets[kind], common))
    count = len(data["classes"])
    logits = torch.nn.functional.one_hot(torch.arange(N) ** 2 % count, count) * 6.0
    views = [
        *evaluate.channel_differences(sample.load(), prepare.load("train")[0]),
        *evaluate.health(sample.load(), prepare.load("train")[0]),
        *evaluate.class_views({"logits": logits}, extractor),
    ]
    passports += [evaluate.passport(score.metric, score, "samples", N, sets["samples"], common) for score in views]
    return [{**each, "rank_deficient": each["n"] <= 64} for each in passports]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, compose_params: Compose) -> Path:
    """A folder with the outputs of a run on digits; tests leave them as they are."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_outputs(compose_params())
        write_text("dvc.lock", LOCK)
    return folder


@pytest.fixture(scope="module")
def rendered(digits: Path, compose_params: Compose) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(digits)
        return report.render(compose_params())


@pytest.fixture
def page(digits: Path, rendered: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The report of the run on digits; its folder is made the current one."""
    monkeypatch.chdir(digits)
    return rendered


def text(page: str) -> str:
    """What a person reads: no style, no tags, single spaces."""
    return " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*</style>", "", page, flags=re.DOTALL)).split())


def test_the_page_stands_alone(page: str, digits: Path) -> None:
    links = re.findall(r"""(?:src|href|srcset|action|poster|data)\s*=\s*["']?([^"'\s>]*)""", page)
    assert links
    assert all(link.startswith("data:image/") for link in links)
    assert not re.search(r"<(script|link|iframe|object|embed|base)\b|@import|url\(", page)
    for path in (digits, Path.home(), Path(report.__file__).parent):
        assert f"{path}/" not in page


def test_all_sections_are_there(page: str) -> None:
    assert re.findall("<h2>(.*)</h2>", page) == [
        "Samples",
        "From noise to images",
        "Metrics",
        "What the classifier sees",
        "Nearest training images",
        "Training",
        "Noise schedule",
        "Settings",
        "Data",
        "Versions and hashes",
        "Passports",
    ]
    assert page.count("<img") == 8 + 10 * 6  # two grids, animation, shares, four plots; the neighbours
    assert page.count("<details") == page.count("</details>") == 3


def test_numbers_and_what_they_are_of(page: str) -> None:
    content = text(page)
    assert (
        "FID 52.16 (200 samples, digits-classifier) At 50 images each: samples 62.60; real vs real 10.43, "
        "untrained 9,390" in content
    )
    assert "All samples 200 52.16 2.600 ± 0.12 0.04850 ± 0.0020 0.190 0.170" in content
    assert "Samples 50 62.60 2.333 ± 0.12" in content
    assert "Real test images: the floor 50 10.43 9.000 ± 0.12 -0.0007000 ± 0.0020 0.950 0.850" in content
    assert "The same, blurred 50 313.0" in content
    assert "Untrained network 50 9,390" in content
    assert "Against the 1,438 training images of digits" in content
    assert "(test accuracy 98.6%)" in content
    assert "Gaussian blur of 1 pixels" in content
    assert "no more images than features" in content
    assert "123,456 weights · 600 steps on 1,438 images of 1\u00d78\u00d78 · 200 samples" in content
    assert "a score of zero has D/2 = 32" in content
    assert "It gives 100.0% of the samples" in content


def test_settings_versions_and_hashes(page: str, params: Params) -> None:
    content = text(page)
    assert f"adam_eps {params.train.adam_eps}" in content
    assert "sigma_1 null" in content
    assert "flip false" in content
    assert "tracking_uri" not in content  # it may hold a password
    assert f"torch {torch.__version__.partition('+')[0]}" in content
    data = prepare.manifest()["splits"]
    for digest in (data["train"]["sha256"], data["test"]["sha256"], "e" * 64, "1" * 64, "5" * 64, "c" * 64):
        assert f"<code>{digest}</code>" in page
    assert "out/data 0123abcd.dir" in content
    assert "deadbeef" not in content  # of the report before this one


def test_every_sampler_has_words():
    assert set(report.DRAWN_BY) == set(METHODS)


def test_without_metrics_the_reason_is_shown(params: Params, compose_params: Compose, workdir: Path) -> None:
    patches = compose_params("data=patches", "data.resolution=16")
    write_outputs(replace(patches, noise=replace(patches.noise, sigma_1=20.0)))
    content = text(report.render(patches))
    assert content.count("Nothing was measured: patches has no labels.") == 2
    assert "unlabelled" in content
    assert "danielbuechele" in content  # the photographs' licence asks for it
    for absent in ("FID", "What the classifier sees", "Passports", "SHA-256 classifier", "out/data"):
        assert absent not in content


def test_fetched_weights_are_said_to_be_so_and_need_no_curves(
    page: str, params: Params, workdir: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(digits / "out", workdir / "out")
    monkeypatch.chdir(workdir)
    model = read_json(train.OUT / "model.json")
    for name in ("loss", "loss_per_level"):
        (train.OUT / f"{name}.csv").unlink()
    with pytest.raises(FileNotFoundError):
        report.render(params)
    write_json(train.OUT / "model.json", model | {"source": {"file": "checkpoint_3.pth", "sha256": "f" * 64}})
    content = text(report.render(params))
    assert f"The weights were fetched from checkpoint_3.pth (SHA-256 {'f' * 64}), not trained here." in content
    assert "600 steps, fetched; data: 1,438 images" in content
    assert f"fetched checkpoint {'f' * 64}" in content
    assert "Denoising score matching" not in content
    recorder = Recorder()
    write_text(report.OUT, content)
    report.complete(recorder)
    assert "history" not in recorder.values
    assert recorder.values["weights"] == model["sha256"]["ema"]


@pytest.mark.parametrize(("loss", "square"), [("ssm", "½ (v·s)²"), ("ssm_vr", "½ ‖s‖²")])
def test_the_objective_is_named(page: str, params: Params, loss: str, square: str) -> None:
    content = text(report.render(replace(params, loss=replace(params.loss, name=loss))))
    assert f"Sliced score matching, σ² ({square} + v·Jv)" in content
    assert "Denoising score matching" not in content
    assert "Denoising score matching" in text(page)


def test_names_are_escaped(digits: Path, params: Params, workdir: Path) -> None:
    """In the page, and in a plot, where a dollar begins mathematics."""
    (workdir / "out").symlink_to(digits / "out")
    evil = "<script>alert('$x')</script>"
    tree = json.loads(json.dumps(prepare.manifest()))
    tree["name"] = evil
    tree["classes"][0] = "$\\nope{$"
    for split in tree["splits"].values():
        split["per_class"]["$\\nope{$"] = split["per_class"].pop("0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "manifest", lambda: tree)
        page = report.render(replace(params, data=replace(params.data, root=evil)))
    assert evil not in page
    assert page.count("&lt;script&gt;alert(&#39;$x&#39;)&lt;/script&gt;") >= 3


def test_the_same_input_gives_the_same_page(page: str, params: Params) -> None:
    assert report.render(params) == page


def test_a_missing_output_is_named(params: Params, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report._track, "run", Recorder().run)
    with pytest.raises(StageError, match=r"out/data/manifest.json does not exist: write it with `dvc repro"):
        report.main(params)
    prepare.main(params)
    with pytest.raises(StageError, match=r"out/schedule/schedule.json does not exist: write it with `dvc repro"):
        report.main(params)
    assert not report.OUT.exists()


def test_tones_are_those_of_each_channel() -> None:
    names = ["mean_difference_red", "std_difference_red", "black_difference", "flat_difference"]
    passports = [{"metric": name, "value": 0.5} for name in names]
    assert report.tones(passports) == {"red": {"mean": 0.5, "std": 0.5}}


def test_short_curves_can_be_drawn(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(digits)
    levels = schedule.load()
    one = np.full((1, 1 + levels["L"]), np.nan)
    one[0, :3] = 20, 5, 4
    assert report.level_plot(one, levels["sigmas"], 0.0).startswith("data:image/svg+xml;base64,")
    assert report.loss_plot(np.array([[20.0, 5.0]]), 32.0).startswith("data:image/svg+xml;base64,")


def test_large_pictures_are_scaled_down() -> None:
    small, large = (_page.shown(Image.new("L", (side, side))) for side in (_page.WIDEST, 10 * _page.WIDEST))
    assert small == large


def test_numbers_for_people() -> None:
    assert [_page.number(x) for x in (9841.4, 1234567, 52.1, 0.00123456, -1e-9, 7)] == [
        "9,841",
        "1,234,567",
        "52.10",
        "0.001235",
        "-1.000e-09",
        "7.000",
    ]


def test_what_the_run_may_lack_is_logged(page: str, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(report._track, "run", recorder.run)
    report.main(params)
    assert report.OUT.read_text(encoding="utf-8") == page
    assert recorder.values["finished"]
    assert recorder.values["samples"] == (np.asarray(Image.open(sample.OUT / "grid.png")).shape, STEPS)
    assert recorder.values["dvc.out/data"] == "0123abcd.dir"


def test_the_mlflow_run_is_completed(page: str, params: Params, tmp_path: Path) -> None:
    """With a real store: every stage before was skipped, so the run is new."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    params = replace(params, runtime=replace(params.runtime, tracking_uri=uri))
    report.main(params)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(params.runtime.experiment)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    metrics = read_json(evaluate.OUT / "metrics.json")
    assert {f"eval/{name}": value for name, value in metrics.items()}.items() <= run.data.metrics.items()
    assert run.data.metrics["features/test_accuracy"] == 0.9861
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [tuple(row) for row in report.curves("loss")]
    assert run.data.params["schedule.L"] == str(schedule.load()["L"])
    assert run.data.tags["dvc.out/data"] == "0123abcd.dir"
    files = {
        file.path
        for folder in ("", "evaluate", "samples", "schedule", "train", "images")
        for file in client.list_artifacts(run.info.run_id, folder or None)
    }
    assert {
        "report.html",
        "evaluate/passports.json",
        "samples/grid.png",
        "schedule/schedule.json",
        "train/loss.csv",
    } <= files
    assert any(name.startswith("images/samples") for name in files)
