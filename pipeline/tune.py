"""Sweep sigma_1, sigma_L and L by Ray Tune, and for each trained network epsilon, T, denoising and the step rule.

A training is dear and drawing is cheap, so there are two levels: each trial trains a network for tune.steps steps, by
Ray Train with runtime.workers of its own, then draws tune.n images in each of the ways of the section `tune` and is
judged by the best FID. The first trial is that of the section `noise` as it is. Reads out/data and out/features; writes
out/tune: report.html with the plots, sweep.txt, trials.json, table.json, and best.yaml, which is also
conf/noise/tuned.yaml, so that this trains and draws with the best setting:

  dvc exp run -S noise=tuned

Trials run in runs/tune-...; the same command goes on there after a crash, and trains nothing again. In MLflow each
trial is a run below that of the sweep.
"""

import argparse
import dataclasses
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image
from safetensors.torch import save_file

from pipeline import (
    _checkpoints,
    _extractors,
    _page,
    _params,
    _ray,
    _stage,
    _sweep,
    _track,
    _trial,
    frontier,
    prepare,
    sample,
    schedule,
    select,
    train,
)
from pipeline._pictures import STYLE
from pipeline._sampler import Sampler
from pipeline._stage import StageError, log
from pipeline._store import read_json, replacing_folder, sha256, write_json, write_text
from pipeline._sweep import AXES, WAY

OUT = Path("out/tune")
TUNED = Path("conf/noise/tuned.yaml")
AS_GIVEN = "as_given"
SECTIONS = ("data", "features", "model", "loss", "noise", "train", "sample", "evaluate", "tune")
CODE = (
    *("tune", "_extractors", "_reference", "_sampler", "_shards", "_sweep", "_trial"),
    *("evaluate", "frontier", "sample", "schedule", "select", "train"),
)
PLOTS = "parallel", "axes", "frontier"
RUNGS = 4, 2  # parts of the training after which ASHA may stop it


def main(params: _params.Params, *, trial: bool = False) -> None:
    extractor = _sweep.extractor(params)
    if trial:
        attempt(params, extractor)
        return
    if params.noise.sde in ("vp", "subvp") and params.tune.sigma_1:
        raise _params.ParamsError(
            f"tune.sigma_1={list(params.tune.sigma_1)}: expected [] with noise.sde={params.noise.sde}, where sigma_1 "
            "follows from noise.beta_min and noise.beta_max"
        )
    kinds = {"sigma_1": float, "sigma_L": float, "L": int}  # whole numbers are searched as such
    axes = {f"noise.{key}": tuple(map(kinds[key], values)) for key in AXES if (values := getattr(params.tune, key))}
    count = networks(params.tune, axes)
    base = of_trial(params)
    what = ", ".join(axes) or "ways to draw alone"
    log.info("1 network as given, %d by %s; %d steps of training each", count, what, params.tune.steps)
    with (
        _sweep.trials("tune", params, base, SECTIONS, CODE, extractor, count + 1) as sweep,
        replacing_folder(OUT) as out,
    ):
        found = [as_given(sweep.plan)]
        search = dataclasses.replace(params.tune, trials=count)
        first_rung = min(rungs(base), default=params.tune.steps)
        found += _ray.sweep(partial(_trial.run, sweep.plan), axes, search, params.runtime, sweep.folder, first_rung)
        rows = sorted((row(each, sweep.folder) for each in found), key=lambda each: each["fid"] or math.inf)
        if rows[0]["fid"] is None:
            raise StageError(f"no trial was finished: {rows[0]['reason']}; the logs are {sweep.folder}/*/{_trial.LOG}")
        publish(rows, params, sweep.folder, out)
        sweep.run.artifact(out, "sweep")
        sweep.run.tables("sweep/table.json")
        sweep.run.metrics({"fid": rows[0]["fid"], "nfe": rows[0]["best"]["nfe"]})
        sweep.run.params({"best": rows[0]["setting"] | {key: rows[0]["best"][key] for key in WAY}})
    shutil.copy(OUT / "best.yaml", TUNED)
    print(Path(OUT, "sweep.txt").read_text(), end="")


def as_given(plan: _trial.Plan) -> _ray.Trial:
    """The trial of the section `noise` as it is, beside which the others are seen."""
    told: list[dict[str, Any]] = [{}]
    try:
        _trial.run(plan, AS_GIVEN, {}, told.append)
    except _trial.TrialError as error:
        return _ray.Trial(AS_GIVEN, {}, told[-1], str(error))
    return _ray.Trial(AS_GIVEN, {}, told[-1], None)


def networks(tune: _params.Tune, axes: dict[str, tuple[float, ...]]) -> int:
    """How many networks."""
    combinations = math.prod(map(len, axes.values()))
    return combinations if tune.search == "grid" or combinations == 1 else tune.trials


def of_trial(params: _params.Params) -> _params.Params:
    """The parameters of each trial."""
    base = _sweep.shortened(params, params.tune.steps, params.tune.n)
    kept = max(base.runtime.keep, len(RUNGS) + 2)  # of all rungs, for another trial that is the same
    return dataclasses.replace(base, runtime=dataclasses.replace(base.runtime, keep=kept))


def attempt(params: _params.Params, extractor: _extractors.Extractor) -> None:
    """One trial, in its folder: train, tell Tune the FID on the way, draw in all ways, keep the best in trial.json."""

    def on_the_way(run: _track.Run) -> None:
        for step in rungs(params):
            fid = rung(params, extractor, step)
            log.info("step %d: FID %.4g of %d images", step, fid, params.tune.n)
            run.metrics({"fid": fid}, step)
            _trial.tell(step=step, fid=fid)

    def measure(run: _track.Run) -> dict[str, Any]:
        base, n = sample.make_sampler(params, "ema"), params.tune.n
        rows = _sweep.drawn([(ways(base, params.tune), sample.weights("ema"))], n, params, extractor)
        return _sweep.told(rows, base, n, params, extractor, run)

    _sweep.attempt(params, measure, on_the_way)


def rungs(params: _params.Params) -> list[int]:
    """The steps before the last at which a trial is judged: multiples of train.log_every, none without ASHA."""
    if params.tune.scheduler == "none":
        return []
    every = params.train.log_every
    steps = {params.train.steps // part // every * every for part in RUNGS}
    return sorted(step for step in steps if 0 < step < params.train.steps)


def rung(params: _params.Params, extractor: _extractors.Extractor, step: int) -> float:
    """Train until a step, and the FID of few images that are drawn as the sections noise and sample say."""
    known = Path(f"fid_{step}.json")
    if known.exists():
        return float(read_json(known))
    folder = train.main(params, until=step)
    levels, shape = schedule.load(), prepare.manifest()["shape"]
    network = train.describe(params.model, shape[0], levels, params.train.space)
    model = {"network": network, "space": params.train.space}
    weights = Path(f"{step}.safetensors")
    save_file(train.below(_checkpoints.read(folder, step), "ema."), weights)
    candidates = [{"step": step, "sha256": sha256(weights)}]
    with _ray.cluster(params.runtime):
        (fid,) = select.judge(candidates, Path(), model, extractor, params)
    write_json(known, fid)
    return fid


def ways(base: Sampler, tune: _params.Tune) -> list[Sampler]:
    """All ways to draw with a network."""
    found, square = [], base.schedule["sigmas"][-1] ** 2
    for denoise in tune.denoise:
        for T in tune.steps_per_level:
            found += [frontier.variant(base, T=T, epsilon=share * square, denoise=denoise) for share in tune.epsilon]
            found += [frontier.variant(base, T=T, snr=r, denoise=denoise) for r in tune.snr]
        if tune.consistent:
            found += frontier.consistent(base, list(tune.steps_per_level), denoise)
    return list({each.name: each for each in found}.values())


def row(found: _ray.Trial, folder: Path) -> dict[str, Any]:
    """What became of a trial: state, reason, setting, and if it was finished its FID, the best way and all ways."""
    setting = {key.removeprefix("noise."): value for key, value in found.setting.items()}
    entry: dict[str, Any] = {"trial": found.name, "setting": setting, "fid": None, "best": None, "ways": []}
    if found.error is not None:
        return entry | {"state": "failed", "reason": found.error}
    done = folder / found.name / _trial.DONE
    if not done.exists():
        reason = f"FID {found.last['fid']:.4g} at step {found.last['step']}"
        return entry | {"state": "stopped early", "reason": reason}
    told = read_json(done)
    entry |= {"setting": told["setting"], "fid": told["fid"], "best": told["rows"][told["best"]], "ways": told["rows"]}
    measured = {key: told[key] for key in told if key not in ("setting", "fid", "rows", "best")}
    return entry | {"state": "finished", "reason": None, "measured": measured}


def publish(rows: list[dict[str, Any]], params: _params.Params, folder: Path, out: Path) -> None:
    """Write all that out/tune has; the rows are sorted, the best trial first, and of the trials in a folder."""
    write_json(out / "trials.json", {"n": params.tune.n, "steps": params.tune.steps, "trials": rows})
    columns = ["trial", *AXES, *WAY, "nfe", "fid", "state", "reason"]
    cells = [flat(each) for each in rows]
    write_json(out / "table.json", {"columns": columns, "data": [[cell.get(key) for key in columns] for cell in cells]})
    write_text(out / "sweep.txt", f"{table(rows)}\n\n{verdict(rows)}\n\n{told(rows[0], params)}\n")
    write_text(out / "best.yaml", tuned(rows[0], params))
    finished = [each for each in rows if each["fid"] is not None]
    plot_parallel(finished, out / "parallel.png")
    plot_axes(finished, params.tune.n, out / "axes.png")
    frontier.plot([way for each in finished for way in each["ways"]], params.tune.n, out / "frontier.png")
    write_text(out / "report.html", page(rows, params, folder, out))


def page(rows: list[dict[str, Any]], params: _params.Params, folder: Path, out: Path) -> str:
    """The sweep as one HTML file, with the plots that are in `out` and the pictures that are in the trials' folders."""
    grids = {each["trial"]: folder / each["trial"] / "grid.png" for each in rows}
    return _page.render(
        "sweep.html",
        {"words": frontier.words},
        data=params.data.name,
        axes=AXES,
        rows=rows,
        told=told(rows[0], params),
        verdict=verdict(rows),
        pictures={name: _page.data_uri((out / f"{name}.png").read_bytes(), "image/png") for name in PLOTS},
        grids={name: _page.shown(Image.open(path)) for name, path in grids.items() if path.exists()},
        measured=json.dumps(rows[0]["measured"], indent=2),
    )


def verdict(rows: list[dict[str, Any]]) -> str:
    """Whether the schedule as given, by default that computed from the data, is as good as the best of the others."""
    given = next(each for each in rows if each["trial"] == AS_GIVEN)
    others = [each["fid"] for each in rows if each["trial"] != AS_GIVEN]
    finished = [fid for fid in others if fid is not None]
    if given["fid"] is None:
        return f"The schedule as given {given['state']}: {given['reason']}."
    if not finished:
        return f"The schedule as given: FID {given['fid']:.4g}; no other network was finished."
    ratio = given["fid"] / min(finished)
    return (
        f"The schedule as given: FID {given['fid']:.4g}, {ratio:.3g} times that of the best of {len(others)} others, "
        f"{len(finished)} of them trained to the end."
    )


def told(best: dict[str, Any], params: _params.Params) -> str:
    """What all numbers of a sweep have in common."""
    features = best["measured"]["extractor"]["name"]
    return (
        f"{params.model.name}, {params.tune.steps} steps of {params.train.batch_size}, data {params.data.name}, "
        f"n = {params.tune.n}, features: {features}, seed {params.train.seed}"
    )


def flat(each: dict[str, Any]) -> dict[str, Any]:
    """One trial in one level."""
    best = each["best"] or {}
    way = {key: best.get(key) for key in (*WAY, "nfe")}
    return each["setting"] | way | {key: each[key] for key in ("trial", "fid", "state", "reason")}


def table(rows: list[dict[str, Any]]) -> str:
    """All trials, the best one first."""
    lines = [f"{'trial':<14}{'sigma_1':>9}{'sigma_L':>9}{'L':>5}  {'best way to draw':<54}{'NFE':>5}{'FID':>9}"]
    for each in rows:
        setting = [each["setting"].get(key) for key in AXES]
        sigma_1, sigma_L, L = ("" if value is None else f"{value:.4g}" for value in setting)
        line = f"{each['trial']:<14}{sigma_1:>9}{sigma_L:>9}{L:>5}  "
        if each["best"]:
            line += f"{frontier.words(each['best']):<54}{each['best']['nfe']:>5}{each['fid']:>9.4g}"
        else:
            line += f"{each['state']}: {each['reason']}"
        lines.append(line)
    return "\n".join(lines)


def tuned(best: dict[str, Any], params: _params.Params) -> str:
    """The best setting, as an option of the group `noise`."""
    way, setting = best["best"], best["setting"]
    told = f"trial {best['trial']}, FID {best['fid']:.4g} of {params.tune.n} images after {params.tune.steps} steps"
    text = f"# @package _global_\n# Written by `python -m pipeline.tune`: {told}.\n"
    given = params.noise
    noise = {
        **{key: getattr(given, key) for key in ("sde", "beta_min", "beta_max", "spacing")},
        **{key: setting[key] for key in AXES},
        "overlap": given.overlap,
        "steps_per_level": way["T"],
        "epsilon": way["epsilon"],
        "epsilon_scale": 1.0,
    }
    if given.sde in ("vp", "subvp"):
        noise["sigma_1"] = None
    drawn = {"method": way["method"], "steps": None, "sigma_1": None, "snr": way["snr"], "denoise": way["denoise"]}
    return text + _params.to_yaml({"noise": noise, "sample": drawn})


def plot_parallel(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw each finished trial as a line through its values, dark where its FID is low."""
    names = [*AXES, "epsilon", "FID"]
    lines = [[*(each["setting"][key] for key in AXES), each["best"]["epsilon"], each["fid"]] for each in rows]
    values = np.array(lines, dtype=float)
    logs = np.log(values)
    low, high = logs.min(0), logs.max(0)
    spread = np.where(high > low, high - low, 1.0)
    places = np.where(high > low, (logs - low) / spread, 0.5)
    norm = LogNorm(values[:, -1].min(), max(values[:, -1].max(), 1.001 * values[:, -1].min()))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.8), layout="constrained")
        axes = figure.subplots()
        colours = matplotlib.colormaps["viridis"](norm(values[:, -1]))
        for k in reversed(range(len(rows))):  # the best one above the others
            axes.plot(range(len(names)), places[k], color=colours[k], lw=2.5 if k == 0 else 1.2)
        for k, name in enumerate(names):
            axes.axvline(k, color="0.8", lw=1, zorder=0)
            for end, value in ((-0.02, low[k]), (1.02, high[k])):
                axes.text(k, end, f"{math.exp(value):.3g}", ha="center", va="top" if end < 0 else "bottom", fontsize=8)
            axes.text(k, 1.13, name, ha="center", fontsize=9)
        axes.set(ylim=(-0.12, 1.22))
        axes.axis("off")
        bar = figure.colorbar(matplotlib.cm.ScalarMappable(norm, "viridis"), ax=axes, label="FID")
        for which in (bar.ax.yaxis.set_major_formatter, bar.ax.yaxis.set_minor_formatter):
            which("{x:g}")
        figure.savefig(path, dpi=130)


def plot_axes(rows: list[dict[str, Any]], n: int, path: Path) -> None:
    """Draw the FID against each of sigma_1, sigma_L and L, a dot for each trial, and against epsilon, for each way."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        for axes, name in zip(figure.subplots(1, 4, sharey=True), (*AXES, "epsilon"), strict=True):
            if name == "epsilon":
                ways = (way for each in rows for way in each["ways"])
                dots = [(way["epsilon"], way["fid"]) for way in ways if way["fid"] and not way["snr"]]
                shown = [each for each in rows if not each["best"]["snr"]]
                best = [(each["best"]["epsilon"], each["fid"]) for each in shown]
                axes.plot([x for x, _ in dots], [fid for _, fid in dots], "o", ms=3, color="0.7", label="each way")
            else:
                shown = rows
                best = [(each["setting"][name], each["fid"]) for each in shown]
            axes.plot([x for x, _ in best], [fid for _, fid in best], "o", ms=5, label="the best of a network")
            given = [dot for dot, each in zip(best, shown, strict=True) if each["trial"] == AS_GIVEN]
            for dot in given:
                axes.plot(*dot, "*", ms=11, color="C1", label="of the schedule as given")
            axes.set(xscale="log", yscale="log", xlabel=name)
            for axis, subs in ((axes.xaxis, (1,) if name == "epsilon" else (1, 2, 5)), (axes.yaxis, (1, 2, 5))):
                axis.set_major_locator(LogLocator(subs=subs))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_locator(NullLocator())
        figure.axes[0].set_ylabel(f"FID of {n:,} images")
        figure.axes[-1].legend(fontsize=7)
        figure.savefig(path, dpi=130)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trial", action="store_true", help=argparse.SUPPRESS)


if __name__ == "__main__":
    from pipeline import tune as this  # since what is defined in __main__ would travel to the workers by value

    _stage.run("tune", __doc__, this.main, _options)
