"""Write the report: settings, curves, samples, metrics with yardsticks, nearest neighbours, versions and hashes.

Reads everything the other stages wrote, and dvc.lock; writes out/report.html, one file that needs nothing beside it.
The same input gives the same bytes. Then it completes the MLflow run, which the stages that DVC skipped as unchanged
have not written to, and ends it.
"""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from pipeline import _neighbours, _page, _params, _stage, _track, evaluate, features, prepare, sample, schedule, train
from pipeline._page import data_uri, shown, svg
from pipeline._pictures import STYLE, grid_picture
from pipeline._stage import StageError
from pipeline._store import read_json, write_text

DRAWN_BY = {
    "annealed_langevin": "annealed Langevin dynamics",
    "consistent": "consistent annealed sampling",
    "euler": "Euler steps of the probability flow",
    "heun": "Heun steps of the probability flow",
    "dpmpp": "DPM-Solver++ steps of the probability flow",
    "dpmpp_sde": "DPM-Solver++ steps of the reverse SDE",
    "rk45": "Runge-Kutta steps of the probability flow",
    "predictor_corrector": "a predictor and corrector of the reverse SDE",
}
OUT = Path("out/report.html")
LOCK = Path("dvc.lock")
GRID = 100  # images in a grid, as in out/samples/grid.png
WINDOWS = 5  # of the training, each twice as long as the one before
NAMED_CLASSES = 60  # there is no room for more names below a plot
METRICS = {"fid": "FID ↓", "is": "IS ↑", "kid": "KID ↓", "precision": "Precision ↑", "recall": "Recall ↑"}
PACKAGES = ("torch", "numpy", "ray", "mlflow", "dvc", "torch-fidelity", "scikit-learn")


def main(params: _params.Params) -> None:
    with _track.run(params) as run:
        try:
            page = render(params)
        except FileNotFoundError as error:
            raise StageError(f"{error.filename} does not exist: write it with `dvc repro`") from error
        write_text(OUT, page)
        complete(run)
        run.finish()


def render(params: _params.Params) -> str:
    """The whole page."""
    data, levels, judged = prepare.manifest(), schedule.load(), read_json(evaluate.OUT / "passports.json")
    zero = levels["dim"] / 2 if params.loss.name == "dsm" else 0.0
    model = read_json(train.OUT / "model.json")
    trained = "source" not in model  # here, not fetched
    with matplotlib.rc_context(STYLE):
        return _page.render(
            "report.html",
            {},
            data=data,
            schedule=levels,
            model=model,
            drawn=sample.manifest(),
            method=DRAWN_BY[sample.manifest()["sampler"]["name"]],
            grid=GRID,
            settings=_params.as_dict(params, *_track.RESULT_SECTIONS),
            metrics=METRICS,
            reason=judged["reason"],
            rows=score_rows(judged["passports"]),
            tones=tones(judged["passports"]),
            tolerated=evaluate.TOLERATED_DIFFERENCE,
            view=classifier_view(judged["passports"], data),
            passports=json.dumps(judged["passports"], indent=2, ensure_ascii=False),
            neighbours=neighbours(),
            pictures={
                "samples": shown(Image.open(sample.OUT / "grid.png")),
                "real": real_grid(),
                "denoising": data_uri((sample.OUT / "denoising.gif").read_bytes(), "image/gif"),
                "schedule": data_uri((schedule.OUT / "schedule.png").read_bytes(), "image/png"),
                "loss": loss_plot(curves("loss"), zero) if trained else None,
                "levels": level_plot(curves("loss_per_level"), levels["sigmas"], zero) if trained else None,
            },
            versions=versions(),
            hashes=hashes(),
            source=json.dumps(data["source"], indent=2, ensure_ascii=False),
        )


def complete(run: _track.Run) -> None:
    """Log what the stages log, as far as this run lacks it, and the report.

    What is there already stays as it is: its content is the same.
    """
    drawn, levels, info = sample.manifest(), schedule.load(), features.manifest()
    run.params({"schedule": {key: levels[key] for key in ("sigma_1", "sigma_L", "L", "epsilon")}})
    trained = "source" not in read_json(train.OUT / "model.json")
    if trained:
        run.history([(int(step), {"train/loss": loss}) for step, loss in curves("loss").tolist()], missing=True)
    values = {f"eval/{name}": value for name, value in read_json(evaluate.OUT / "metrics.json").items()}
    run.metrics(values | ({"features/test_accuracy": info["test_accuracy"]} if info["labelled"] else {}))
    run.image(np.asarray(Image.open(sample.OUT / "grid.png")), "samples", drawn["step"])
    run.trained(train.weights_sha256())
    run.tags({f"dvc.{path}": digest for path, digest in dvc_hashes().items()})
    run.artifact(schedule.OUT)
    for name in ("loss", "loss_per_level") if trained else ():
        run.artifact(train.OUT / f"{name}.csv", "train")
    for name in ("grid.png", "denoising.gif"):
        run.artifact(sample.OUT / name, "samples")
    run.artifact(evaluate.OUT, "evaluate")
    run.tables("evaluate/table.json")
    run.artifact(OUT)


def score_rows(passports: list[evaluate.Passport]) -> dict[str, dict[str, Any]]:
    """The compared metrics by row: "all" has all samples, the others are sets of equal size; {} if nothing is measured.

    Each row is {"n": images, "scores": metric name to passport}.
    """
    rows: dict[str, dict[str, Any]] = {}
    for each in passports:
        if each["metric"] in METRICS:
            key = each["set"] if each["name"].endswith(f".{each['set']}") else "all"
            rows.setdefault(key, {"n": each["n"], "scores": {}})["scores"][each["metric"]] = each
    return rows


def tones(passports: list[evaluate.Passport]) -> dict[str, dict[str, float]]:
    """Channel name to the "mean" and "std" of its pixels, samples minus data."""
    found: dict[str, dict[str, float]] = {}
    for each in passports:
        statistic, difference, channel = each["metric"].partition("_difference")
        if difference and statistic in ("mean", "std"):
            found.setdefault(channel.removeprefix("_") or "grey", {})[statistic] = each["value"]
    return found


def classifier_view(passports: list[evaluate.Passport], data: dict[str, Any]) -> dict[str, Any] | None:
    """What the classifier sees in the samples; None where no classifier looked at them."""
    confident = [each for each in passports if each["metric"] == "confident_fraction"]
    if not confident:
        return None
    shares = [each["value"] for each in passports if each["metric"].startswith("share_")]
    counts = data["splits"]["train"]["per_class"]
    return {
        "confident": confident[0]["value"],
        "threshold": evaluate.CONFIDENT,
        "plot": share_plot(shares, [counts[name] / sum(counts.values()) for name in data["classes"]], data["classes"]),
    }


def neighbours() -> dict[str, Any]:
    """The first samples, each with its nearest training images, and how near all are, beside held-out images."""
    found, (data, _), x = read_json(evaluate.OUT / "neighbours.json"), prepare.load("train"), sample.load()
    first = found["pixels"]["samples"]
    return {
        "rows": [
            {
                "image": shown(picture(image)),
                "found": [
                    {"image": shown(picture(data[i])), "distance": d} for i, d in zip(rows, distances, strict=True)
                ],
            }
            for image, rows, distances in zip(x, first["index"], first["distance"], strict=False)
        ],
        "spaces": {
            space: {
                "near": finding["near"],
                **{
                    kind: {"n": len(finding[kind]["nearest"]), "median": float(np.median(finding[kind]["nearest"]))}
                    for kind in ("samples", "test")
                },
            }
            for space, finding in found.items()
        },
        "expected": _neighbours.NEAR,
        "suspicious": _neighbours.SUSPICIOUS,
        "plot": data_uri((evaluate.OUT / "distances.png").read_bytes(), "image/png"),
    }


def spread(n: int, k: int) -> np.ndarray:
    """Numbers of min(n, k) of n rows, evenly spaced: a data set may be sorted by class."""
    return np.linspace(0, n - 1, min(n, k)).astype(int)


def curves(name: str) -> np.ndarray:
    """A CSV file of the stage `train` as float64, (rows, columns), steps first; NaN where a level had no sample."""
    return np.genfromtxt(train.OUT / f"{name}.csv", delimiter=",", skip_header=1, ndmin=2)


def loss_plot(loss: np.ndarray, zero: float) -> str:
    """The loss over the steps, with a running mean if there are many rows, beside that of a zero score."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    steps, values = loss.T
    width = len(loss) // 20
    axes.plot(steps, values, color="C0", lw=1, alpha=0.4 if width > 1 else 1)
    if width > 1:
        middle = slice((width - 1) // 2, (width - 1) // 2 + len(loss) - width + 1)
        mean = np.convolve(values, np.full(width, 1 / width), "valid")
        axes.plot(steps[middle], mean, color="C0", label=f"mean of {width} rows")
    mark_zero_score(axes, zero, values)
    axes.set(xlabel="step", title="loss")
    axes.legend()
    return svg(figure)


def level_plot(loss: np.ndarray, levels: list[float], zero: float) -> str:
    """The loss of each noise level, averaged over windows of the training, from light to dark; its last row as dots."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    sigmas = np.array(levels)
    steps = np.concatenate([[0], loss[:, 0]]).astype(int)
    edges = sorted({0, *(len(loss) >> k for k in range(WINDOWS))})
    shades = matplotlib.colormaps["Blues"](np.linspace(0.35, 1, len(edges) - 1))
    for first, last, shade in zip(edges[:-1], edges[1:], shades, strict=True):
        mean = np.ma.masked_invalid(loss[first:last, 1:]).mean(axis=0).filled(np.nan)
        there = np.isfinite(mean)
        axes.plot(sigmas[there], mean[there], color=shade, label=f"steps {steps[first] + 1:,} to {steps[last]:,}")
    axes.plot(sigmas, loss[-1, 1:], "o", ms=3, color="C1", label=f"steps {steps[-2] + 1:,} to {steps[-1]:,}")
    mark_zero_score(axes, zero, loss[:, 1:])
    axes.set(xscale="log", xlabel=r"$\sigma$ (pixel units)", title="loss of each noise level")
    axes.legend(fontsize=7)
    return svg(figure)


def mark_zero_score(axes: Axes, zero: float, losses: np.ndarray) -> None:
    """Draw the loss of a zero score, and make the axis logarithmic where the losses span more than a decade."""
    label = f"zero score: D/2 = {zero:g}" if zero else "zero score"
    axes.axhline(zero, color="0.6", lw=1, ls="--", label=label)
    least, most = np.nanmin(losses), np.nanmax(losses)
    if 0 < 10 * least < most:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=min(0, least))


def share_plot(shares: list[float], real: list[float], names: list[str]) -> str:
    """Each class's share of the samples beside its share of the training images."""
    figure = Figure(figsize=(10.6, 2.8), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(names))
    axes.bar(place - 0.2, shares, 0.4, color="C0", label="samples, as the classifier sees them")
    axes.bar(place + 0.2, real, 0.4, color="0.75", label="training images, by their labels")
    named = names if len(names) <= NAMED_CLASSES else []
    turned = 0 if sum(map(len, named)) <= 60 else 90
    axes.set_xticks(place[: len(named)], named, rotation=turned, parse_math=False)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(False, axis="x")
    axes.margins(y=0.25)
    axes.legend(ncols=2, loc="upper left")
    return svg(figure)


def real_grid() -> str:
    """As many training images as the grid of samples shows."""
    data, _ = prepare.load("train")
    tiles = data[spread(len(data), min(GRID, sample.manifest()["n"]))]
    return shown(grid_picture(torch.from_numpy(tiles), columns=10))


def picture(image: np.ndarray) -> Image.Image:
    """One image, uint8 (C, H, W), as it is."""
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
    return Image.fromarray(pixels[:, :, 0] if len(image) == 1 else pixels)


def versions() -> dict[str, str]:
    """What ran here: code, Python, packages, machine."""
    found = {"code": _track.revision() or "not in git", "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed here"
    return found | {"platform": platform.platform(), "CPUs": str(os.cpu_count())}


def hashes() -> dict[str, str]:
    """What was computed from what: the SHA-256 that the stages noted, then DVC's hashes by path."""
    splits, model, info = prepare.manifest()["splits"], read_json(train.OUT / "model.json"), features.manifest()
    weights = model["sha256"]
    found = {f"{split} images": splits[split]["sha256"] for split in prepare.SPLITS}
    found |= {"averaged weights": weights["ema"], "initial weights": weights["initial"]}
    if "source" in model:
        found |= {"fetched checkpoint": model["source"]["sha256"]}
    found |= {"samples": sample.manifest()["sha256"]}
    return found | ({"classifier": info["sha256"]} if info["labelled"] else {}) | dvc_hashes()


def dvc_hashes() -> dict[str, str]:
    """Path to hash of all outputs in dvc.lock but the report itself, which is about to change; {} without DVC."""
    if not LOCK.is_file():
        return {}
    stages = yaml.safe_load(LOCK.read_text(encoding="utf-8")).get("stages", {})
    outs = [out for stage in stages.values() for out in stage.get("outs", [])]
    return {out["path"]: out[out.get("hash", "md5")] for out in outs if out["path"] != OUT.as_posix()}


if __name__ == "__main__":
    _stage.run("report", __doc__, main)
