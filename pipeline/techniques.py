"""Compare the Techniques of NCSNv2 (arXiv:2006.09011), on and off in the paper's groups {5}, {1, 2, 4} and {3}.

Without 1, 2 and 4: the levels, T and epsilon of 2019 (conf/noise/ncsn.yaml); with them those of the section `noise`.
Without 3: the network ncsn, which is told the level; with it ncsnv2, whose output is divided by sigma. Without 5: the
last weights; with it their average. So four networks for each of ablation.seeds, of model.width and ablation.steps
steps, and for each network both weights; ablation.n images each, with or without the denoising step as the section
`sample` says. Reads out/data and out/features; writes out/techniques: techniques.txt, techniques.json, fid.png and
grids.png. Trials run in runs/techniques-..., where the same command goes on after a crash.
"""

import argparse
import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from safetensors.torch import save_file

from pipeline import _checkpoints, _extractors, _params, _ray, _shards, _stage, _sweep, _track, _trial, sample, train
from pipeline._pictures import STYLE
from pipeline._stage import StageError
from pipeline._store import read_json, replacing_folder, sha256, store, write_json, write_text

OUT = Path("out/techniques")
SECTIONS = ("data", "features", "model", "loss", "noise", "train", "sample", "evaluate", "ablation")
CODE = (
    *("techniques", "_extractors", "_reference", "_sampler", "_shards", "_sweep", "_trial"),
    *("evaluate", "frontier", "sample", "schedule", "select", "train"),
)
NETWORKS = {  # by name: whether Techniques 1, 2, 4 are on, and whether 3 is
    "none": (False, False),
    "1, 2, 4": (True, False),
    "3": (False, True),
    "1, 2, 3, 4": (True, True),
}
AVERAGED = {"none": "5", "1, 2, 4": "1, 2, 4, 5", "3": "3, 5", "1, 2, 3, 4": "all"}  # with 5 added
OF_2019 = {"spacing": "geometric", "sigma_1": 1.0, "sigma_L": 0.01, "L": 10, "steps_per_level": 100, "epsilon": 2e-5}
SHOWN = 25  # images of a row


def main(params: _params.Params, *, trial: bool = False) -> None:
    extractor = _sweep.extractor(params)
    if trial:
        attempt(params, extractor)
        return
    p, base = params.ablation, _sweep.shortened(params, params.ablation.steps, params.ablation.n)
    variants = {
        name: {
            **({} if levels else {f"noise.{key}": value for key, value in OF_2019.items()}),
            **{"model.name": "ncsnv2" if network else "ncsn", "model.multipliers": None, "noise.sde": "none"},
            **{f"model.{key}": None for key in _params.OF_SDES},
        }
        for name, (levels, network) in NETWORKS.items()
    }
    axes: dict[str, tuple[Any, ...]] = {"variant": tuple(variants), "train.seed": p.seeds}
    search = dataclasses.replace(params.tune, search="grid", scheduler="none", steps=p.steps)
    total = len(variants) * len(p.seeds)
    with (
        _sweep.trials("techniques", params, base, SECTIONS, CODE, extractor, total, variants) as sweep,
        replacing_folder(OUT) as out,
    ):
        found = _ray.sweep(partial(_trial.run, sweep.plan), axes, search, params.runtime, sweep.folder, p.steps)
        rows = table_of(found, sweep.folder)
        if rows[-1]["mean"] is None:
            raise StageError(f"no trial was finished: {rows[0]['reasons'][0]}; the logs are {sweep.folder}/*/log.txt")
        publish(rows, base, extractor, out)
        sweep.run.artifact(out, "techniques")
        sweep.run.metrics({f"fid/{each['name'].replace(', ', '_')}": each["mean"] for each in rows if each["fid"]})
    print(Path(OUT, "techniques.txt").read_text(), end="")


def attempt(params: _params.Params, extractor: _extractors.Extractor) -> None:
    """One trial, in its folder: a network, with its last weights and with their average."""

    def measure(run: _track.Run) -> dict[str, Any]:
        base, n, weights = sample.make_sampler(params, "ema"), params.ablation.n, Path("last.safetensors")
        folder = store(params.runtime.storage) / f"train-{read_json(train.OUT / 'model.json')['fingerprint']}"
        save_file(train.below(_checkpoints.read(folder, base.step), "model."), weights)
        last = dataclasses.replace(base, weights="last", weights_sha256=sha256(weights))
        rows = _sweep.drawn([([base], sample.weights("ema")), ([last], weights)], n, params, extractor)
        for each in rows:
            each["weights"] = each["order"].sampler.weights
            if each["fid"] is not None:
                np.save(f"images_{each['weights']}.npy", _shards.load(each["order"], params.runtime)[:SHOWN])
        return _sweep.told(rows, base, n, params, extractor, run)

    _sweep.attempt(params, measure)


def table_of(found: list[_ray.Trial], folder: Path) -> list[dict[str, Any]]:
    """A row for each set of Techniques, the worst first: its FIDs, one for each seed that gave images, and the reasons
    of the others."""
    rows: dict[str, dict[str, Any]] = {}
    for each in sorted(found, key=lambda each: each.setting["train.seed"]):
        variant = each.setting["variant"]
        failed = [{"weights": kind, "fid": None, "reason": each.error, "nfe": None} for kind in ("last", "ema")]
        told = failed if each.error is not None else read_json(folder / each.name / _trial.DONE)["rows"]
        for way in told:
            name = AVERAGED[variant] if way["weights"] == "ema" else variant
            row = rows.setdefault(
                name, {"name": name, "nfe": None, "seeds": [], "fid": [], "reasons": [], "images": None}
            )
            if way["fid"] is None:
                row["reasons"].append(way["reason"])
                continue
            row["nfe"] = way["nfe"]
            row["seeds"].append(each.setting["train.seed"])
            row["fid"].append(way["fid"])
            row["images"] = row["images"] or str(folder / each.name / f"images_{way['weights']}.npy")
    for row in rows.values():
        row["mean"] = float(np.mean(row["fid"])) if row["fid"] else None
        row["std"] = float(np.std(row["fid"], ddof=1)) if len(row["fid"]) > 1 else None
    return sorted(rows.values(), key=lambda row: -(row["mean"] or math.inf))


def publish(rows: list[dict[str, Any]], base: _params.Params, extractor: _extractors.Extractor, out: Path) -> None:
    """Write all that out/techniques has."""
    steps, n = base.train.steps, base.ablation.n
    write_json(
        out / "techniques.json", {"metric": "fid", "n": n, "steps": steps, "extractor": extractor.name, "rows": rows}
    )
    told = f"{steps} steps of {base.train.batch_size}, data {base.data.name}, n = {n}, features: {extractor.name}, "
    told += "with" if base.sample.denoise else "without"
    write_text(out / "techniques.txt", f"{table(rows)}\n\n{told} the denoising step\n")
    drawn = [each for each in rows if each["fid"]]
    plot(drawn, n, out / "fid.png")
    _sweep.plot_grids(drawn, [Path(each["images"]) for each in drawn], 4, out / "grids.png")


def table(rows: list[dict[str, Any]]) -> str:
    """The sets of Techniques, the worst first."""
    lines = [f"{'Techniques':<14}{'NFE':>6}{'seeds':>7}  FID"]
    for each in rows:
        fid = _sweep.spread(each["mean"], each["std"]) if each["fid"] else "none"
        failed = f"  failed: {each['reasons'][0]}" if each["reasons"] else ""
        lines.append(f"{each['name']:<14}{each['nfe'] or '':>6}{len(each['seeds']):>7}  {fid}{failed}")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], n: int, path: Path) -> None:
    """Draw a line for each set of Techniques, a dot for each seed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        for k, each in enumerate(rows):
            axes.plot(each["fid"], [k] * len(each["fid"]), "o", ms=5, color="C0", alpha=0.6)
            axes.plot(each["mean"], k, "|", ms=18, color="C0")
        axes.set_yticks(range(len(rows)), [each["name"] for each in rows])
        axes.set(xscale="log", xlabel=f"FID of {n:,} images; bar: the mean over seeds", ylabel="Techniques that are on")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.invert_yaxis()
        figure.savefig(path, dpi=130)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trial", action="store_true", help=argparse.SUPPRESS)


if __name__ == "__main__":
    from pipeline import techniques as this  # since what is defined in __main__ would travel to the workers by value

    _stage.run("techniques", __doc__, this.main, _options)
