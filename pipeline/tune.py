"""Sweep sigma_1, sigma_L and L by Ray Tune, and for each trained network epsilon, T, denoising and the step rule.

A training is dear and drawing is cheap, so there are two levels: each trial trains a network for tune.steps steps, by
Ray Train with runtime.workers of its own, then draws tune.n images in each of the ways of the section `tune` and is
judged by the best FID. The first trial is that of the section `noise` as it is. Reads out/data and out/features; writes
out/tune: trials.json, table.json, sweep.txt and plots, and best.yaml, which is also conf/noise/tuned.yaml, so that this
trains and draws with the best setting:

  dvc exp run -S noise=tuned

Trials run in runs/tune-...; the same command goes on there after a crash, and trains nothing again. In MLflow each
trial is a run below that of the sweep.
"""

import argparse
import dataclasses
import math
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from safetensors.torch import save_file

from pipeline import (
    _checkpoints,
    _extractors,
    _params,
    _ray,
    _shards,
    _stage,
    _track,
    _trial,
    evaluate,
    features,
    frontier,
    prepare,
    sample,
    schedule,
    select,
    train,
)
from pipeline._pictures import STYLE, grid_picture
from pipeline._sampler import Sampler
from pipeline._stage import StageError, log
from pipeline._store import code_digest, fingerprint, read_json, replacing_folder, sha256, write_json, write_text

OUT = Path("out/tune")
TUNED = Path("conf/noise/tuned.yaml")
AXES = ("sigma_1", "sigma_L", "L")  # of which each setting needs a training
AS_GIVEN = "as_given"
WAY = ("method", "T", "epsilon", "snr", "denoise")  # of drawing with a network
SECTIONS = ("data", "features", "model", "loss", "noise", "train", "sample", "evaluate", "tune")
CODE = (
    *("tune", "_extractors", "_reference", "_sampler", "_shards", "_trial"),
    *("evaluate", "frontier", "sample", "schedule", "select", "train"),
)
RUNGS = 4, 2  # parts of the training after which ASHA may stop it
GRID = 100  # images in a trial's picture


def main(params: _params.Params, *, trial: bool = False) -> None:
    extractor = _extractors.choose(params.evaluate)
    if extractor is None:
        raise StageError(
            "a sweep needs features: the data has no labels to train a classifier on, and there are no Inception "
            "weights: name the file with evaluate.inception_weights=PATH"
        )
    if trial:
        attempt(params, extractor)
        return
    kinds = {"sigma_1": float, "sigma_L": float, "L": int}  # whole numbers are searched as such
    axes = {f"noise.{key}": tuple(map(kinds[key], values)) for key in AXES if (values := getattr(params.tune, key))}
    identity = {
        "params": _params.result(params, *SECTIONS),
        "data": prepare.manifest()["splits"]["train"]["sha256"],
        "extractor": extractor.sha256,
        "code": code_digest("ncsn", *(f"pipeline/{name}.py" for name in CODE)),
    }
    folder = Path("runs", f"tune-{fingerprint(identity)}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    trials = count(params.tune, axes)
    what = ", ".join(axes) or "ways to draw alone"
    log.info("1 network as given, %d by %s; %d steps of training each, in %s", trials, what, params.tune.steps, folder)
    with (
        _stage.StopSignals(),
        _track.run(params, sweep="sweep") as run,
        _ray.cluster(params.runtime),
        replacing_folder(OUT) as out,
    ):
        _ray.trainings(params.runtime)
        paths = [str(_ray.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        plan = _trial.Plan(
            root=str(Path.cwd()),
            folder=str(folder),
            inputs=(str(prepare.OUT), str(features.OUT)),
            program=(sys.executable, "-m", "pipeline.tune", "--trial"),
            environment=_ray.address(params.runtime) | {"PYTHONPATH": os.pathsep.join(paths)},
            params=_params.as_dict(of_trial(params, run.id)),
        )
        with _watched(folder, trials + 1):
            found = [as_given(plan)]
            search = dataclasses.replace(params.tune, trials=trials)
            first_rung = min(rungs(of_trial(params, None)), default=params.tune.steps)
            found += _ray.sweep(partial(_trial.run, plan), axes, search, params.runtime, folder, first_rung)
        rows = sorted((row(each, folder) for each in found), key=lambda each: each["fid"] or math.inf)
        if rows[0]["fid"] is None:
            raise StageError(f"no trial was finished: {rows[0]['reason']}; the logs are {folder}/*/{_trial.LOG}")
        publish(rows, params, out)
        run.artifact(out, "sweep")
        run.tables("sweep/table.json")
        run.metrics({"fid": rows[0]["fid"], "nfe": rows[0]["best"]["nfe"]})
        run.params({"best": rows[0]["setting"] | {key: rows[0]["best"][key] for key in WAY}})
        run.finish()
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


def count(tune: _params.Tune, axes: dict[str, tuple[float, ...]]) -> int:
    """How many networks."""
    combinations = math.prod(map(len, axes.values()))
    return combinations if tune.search == "grid" or combinations == 1 else tune.trials


def of_trial(params: _params.Params, parent: str | None) -> _params.Params:
    """The parameters of each trial, which runs in another folder; checked like any others.

    Raises:
        ParamsError: If a trial cannot have them.
    """
    p, steps = params.train, params.tune.steps
    rest = -(-steps // p.log_every) * p.log_every
    storage = params.runtime.storage
    return _params.parse(
        _params.as_dict(
            dataclasses.replace(
                params,
                train=dataclasses.replace(p, steps=steps, save_every=rest, preview_every=rest, keep_every=None),
                select=dataclasses.replace(params.select, rule="last", n=params.tune.n),
                runtime=dataclasses.replace(
                    params.runtime,
                    storage=storage if storage.startswith("s3://") else str(Path(storage).resolve()),
                    tracking_uri=_track.tracking_uri(params),
                    parent_run=parent,
                    keep=max(params.runtime.keep, len(RUNGS) + 2),  # of all rungs, for another trial that is the same
                ),
            )
        )
    )


def attempt(params: _params.Params, extractor: _extractors.Extractor) -> None:
    """One trial, in its folder: train, tell Tune the FID on the way, draw in all ways, keep the best in trial.json."""
    if not Path(_trial.DONE).exists():
        with _stage.StopSignals(), _track.run(params) as run:
            schedule.main(params)
            for step in rungs(params):
                fid = on_the_way(params, extractor, step)
                log.info("step %d: FID %.4g of %d images", step, fid, params.tune.n)
                run.metrics({"fid": fid}, step)
                _trial.tell(step=step, fid=fid)
            train.main(params)
            select.main(params)
            found = best_way(params, extractor, run)
            run.finish()
        write_json(Path(_trial.DONE), found)
    _trial.tell(step=params.train.steps, fid=read_json(Path(_trial.DONE))["fid"])


def rungs(params: _params.Params) -> list[int]:
    """The steps before the last at which a trial is judged: multiples of train.log_every, none without ASHA."""
    if params.tune.scheduler == "none":
        return []
    every = params.train.log_every
    steps = {params.train.steps // part // every * every for part in RUNGS}
    return sorted(step for step in steps if 0 < step < params.train.steps)


def on_the_way(params: _params.Params, extractor: _extractors.Extractor, step: int) -> float:
    """Train until a step, and the FID of few images that are drawn as the sections noise and sample say."""
    known = Path(f"fid_{step}.json")
    if known.exists():
        return float(read_json(known))
    folder = train.main(params, until=step)
    levels, shape = schedule.load(), prepare.manifest()["shape"]
    network = train.describe(params.model, shape[0], levels["sigmas"], params.train.space)
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


def best_way(params: _params.Params, extractor: _extractors.Extractor, run: _track.Run) -> dict[str, Any]:
    """Draw and judge in all ways, log the best one; what trial.json says.

    Raises:
        StageError: If none drew images.
    """
    base, n = sample.make_sampler(params, "ema"), params.tune.n
    with _ray.cluster(params.runtime):
        rows = frontier.draw(ways(base, params.tune), sample.weights("ema"), n, params)
        frontier.judge(rows, extractor, n, params)
    rows.sort(key=lambda each: (each["nfe"], each["fid"] or math.inf))
    drawn = [each for each in rows if each["fid"] is not None]
    if not drawn:
        raise StageError(f"no way to draw gave images: {rows[0]['reason']}")
    best = min(drawn, key=lambda each: each["fid"])
    x = _shards.load(best["order"], params.runtime)
    grid = grid_picture(torch.from_numpy(x[:GRID]), math.isqrt(min(n, GRID)))
    name = f"fid_{extractor.short}_{evaluate.thousands(n)}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_json(folder / "passports.json", [passport(best, name, extractor, x)])
        write_json(folder / "metrics.json", {name: best["fid"]})
        run.artifact(folder, "evaluate")
    run.metrics({f"eval/{name}": best["fid"], "fid": best["fid"], "nfe": best["nfe"]}, base.step)
    levels = {key: schedule.load()[key] for key in ("spacing", *AXES)}
    # MLflow compares runs by the first parameters that differ, in alphabetical order.
    run.params({"axis": {key: levels[key] for key in AXES} | {"epsilon": best["epsilon"]}})
    run.params({"best": {key: best[key] for key in WAY}})
    run.image(np.asarray(grid), "samples", base.step)
    grid.save("grid.png")
    measured = frontier.record(rows, extractor, n, base)
    return {"setting": levels, "fid": best["fid"], "best": rows.index(best), **measured}


def passport(best: dict[str, Any], name: str, extractor: _extractors.Extractor, x: np.ndarray) -> dict[str, Any]:
    """Of the FID of the best way, as `evaluate` would write it."""
    s = best["order"].sampler
    manifest = {"ranges": 1, "seed": s.seed, "weights": s.weights, "weights_sha256": s.weights_sha256, "step": s.step}
    manifest |= {"selection": select.rule(), "sampler": s.settings, "nfe": s.nfe}
    score = evaluate.Score("fid", best["fid"], None, extractor.layer("fid"))
    images = evaluate.ImageSet(x, manifest)
    whole = evaluate.passport(name, score, "samples", len(x), images, evaluate.provenance(extractor))
    return {**whole, "rank_deficient": best["rank_deficient"]}


@contextmanager
def _watched(folder: Path, total: int) -> Iterator[None]:
    """Show how many trials have ended, and the best FID so far."""
    over = threading.Event()

    def watch() -> None:
        with _stage.progress(total, "trial", "tune") as bar:
            while True:
                last = over.wait(2.0)
                done = {path: float(read_json(path)["fid"]) for path in folder.glob(f"*/{_trial.DONE}")}
                failed = len(list(folder.glob(f"*/{_trial.FAILED}")))
                bar.set_postfix(failed=failed, best=f"{min(done.values(), default=math.nan):.4g}", refresh=False)
                bar.update(len(done) + failed - bar.n)
                if last:
                    return

    thread = threading.Thread(target=watch, name="trials", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


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


def publish(rows: list[dict[str, Any]], params: _params.Params, out: Path) -> None:
    """Write all that out/tune has; the rows are sorted, the best trial first."""
    write_json(out / "trials.json", {"n": params.tune.n, "steps": params.tune.steps, "trials": rows})
    columns = ["trial", *AXES, *WAY, "nfe", "fid", "state", "reason"]
    cells = [flat(each) for each in rows]
    write_json(out / "table.json", {"columns": columns, "data": [[cell.get(key) for key in columns] for cell in cells]})
    write_text(out / "sweep.txt", table(rows) + "\n")
    write_text(out / "best.yaml", tuned(rows[0], params))
    finished = [each for each in rows if each["fid"] is not None]
    plot_parallel(finished, out / "parallel.png")
    plot_axes(finished, params.tune.n, out / "axes.png")
    frontier.plot([way for each in finished for way in each["ways"]], params.tune.n, out / "frontier.png")


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
    noise = {key: setting[key] for key in ("spacing", *AXES)} | {
        "overlap": params.noise.overlap,
        "steps_per_level": way["T"],
        "epsilon": way["epsilon"],
        "epsilon_scale": 1.0,
    }
    drawn = {"method": way["method"], "snr": way["snr"], "denoise": way["denoise"]}
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
