"""What sweeps and ablations have in common: many short trainings by Ray Tune, in a folder where they go on after a
crash, watched by a bar, with an MLflow run above those of the trials."""

import dataclasses
import math
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from pipeline import (
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
    schedule,
    select,
    train,
)
from pipeline._pictures import STYLE, grid_picture
from pipeline._sampler import Sampler, by_langevin
from pipeline._stage import StageError, log
from pipeline._store import code_digest, fingerprint, read_json, write_json

AXES = ("sigma_1", "sigma_L", "L")  # of which each setting needs a training
WAY = ("method", "T", "epsilon", "snr", "denoise")  # of drawing with a network
GRID = 100  # images in a trial's picture


@dataclass(frozen=True)
class Sweep:
    """What the trials of a stage are run with."""

    folder: Path
    plan: _trial.Plan
    run: _track.Run


def extractor(params: _params.Params) -> _extractors.Extractor:
    """Of the features that trials are judged by; raises StageError if there is none."""
    found = _extractors.choose(params.evaluate)
    if found is None:
        raise StageError(
            "trials are judged by features: the data has no labels to train a classifier on, and there are no "
            "Inception weights: name the file with evaluate.inception_weights=PATH"
        )
    return found


@contextmanager
def trials(
    stage: str,
    params: _params.Params,
    base: _params.Params,
    sections: Sequence[str],
    code: Sequence[str],
    extractor: _extractors.Extractor,
    total: int,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[Sweep]:
    """A cluster, a folder in runs/ and an MLflow run for the trials of a stage.

    Args:
        stage: Its name; `python -m pipeline.STAGE --trial` is a trial's program.
        params: Of the stage.
        base: Of each trial, but for its setting.
        sections: Of params, which with data, extractor and code determine the folder.
        code: The modules of pipeline/ that the results depend on.
        extractor: Of features.
        total: Trials.
        variants: See `_trial.Plan`.
    """
    told = {
        "params": _params.result(params, *sections),
        "data": prepare.manifest()["splits"]["train"]["sha256"],
        "extractor": extractor.sha256,
        "code": code_digest("ncsn", *(f"pipeline/{name}.py" for name in code)),
    }
    folder = Path("runs", f"{stage}-{fingerprint(told)}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log.info("%d trials in %s", total, folder)
    with _stage.StopSignals(), _track.run(params, sweep=stage) as run, _ray.cluster(base.runtime):
        _ray.trainings(base.runtime)
        child = dataclasses.replace(base, runtime=dataclasses.replace(base.runtime, parent_run=run.id))
        paths = [str(_ray.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        plan = _trial.Plan(
            root=str(Path.cwd()),
            folder=str(folder),
            inputs=(str(prepare.OUT), str(features.OUT)),
            program=(sys.executable, "-m", f"pipeline.{stage}", "--trial"),
            environment=_ray.address(base.runtime) | {"PYTHONPATH": os.pathsep.join(paths)},
            params=_params.as_dict(child),
            variants=variants or {},
        )
        with _watched(folder, total, stage):
            yield Sweep(folder, plan, run)
        run.finish()


def shortened(params: _params.Params, steps: int, n: int) -> _params.Params:
    """The parameters of a trial, which trains for so many steps, runs in another folder and is judged by n images;
    checked like any others.

    Raises:
        ParamsError: If a trial cannot have them.
    """
    p, storage = params.train, params.runtime.storage
    rest = -(-steps // p.log_every) * p.log_every
    return _params.parse(
        _params.as_dict(
            dataclasses.replace(
                params,
                train=dataclasses.replace(p, steps=steps, save_every=rest, preview_every=rest, keep_every=None),
                select=dataclasses.replace(params.select, rule="last", n=n),
                sample=by_langevin(params.sample),
                runtime=dataclasses.replace(
                    params.runtime,
                    storage=storage if storage.startswith("s3://") else str(Path(storage).resolve()),
                    tracking_uri=_track.tracking_uri(params),
                ),
            )
        )
    )


def attempt(
    params: _params.Params,
    measure: Callable[[_track.Run], dict[str, Any]],
    on_the_way: Callable[[_track.Run], None] = lambda run: None,
) -> None:
    """One trial, in its folder: train, measure, keep in trial.json what was measured, tell Tune its "fid"; what is
    kept is not done again."""
    if not Path(_trial.DONE).exists():
        with _stage.StopSignals(), _track.run(params) as run:
            run.metrics({"fid": math.nan})  # MLflow compares runs by the metric that they have had first
            schedule.main(params)
            levels = schedule.load()
            # MLflow compares runs by the first parameters that differ, in alphabetical order.
            run.params({"axis": {key: levels[key] for key in AXES}})
            try:
                on_the_way(run)
                train.main(params)
                select.main(params)
                found = measure(run)
            except BaseException:  # what was drawn on the way was drawn so
                run.params({"axis": {"epsilon": levels["epsilon"]}})
                raise
            run.finish()
        write_json(Path(_trial.DONE), found)
    _trial.tell(step=params.train.steps, fid=read_json(Path(_trial.DONE))["fid"])


def drawn(
    ways: Sequence[tuple[list[Sampler], Path]], n: int, params: _params.Params, extractor: _extractors.Extractor
) -> list[dict[str, Any]]:
    """The rows of `frontier` for n images of each of the samplers with weights of a file, cheapest first.

    Raises:
        StageError: If none drew images.
    """
    rows = []
    with _ray.cluster(params.runtime):
        for samplers, weights in ways:
            rows += frontier.draw(samplers, weights, n, params)
        frontier.judge(rows, extractor, n, params)
    rows.sort(key=lambda each: (each["nfe"], each["fid"] or math.inf))
    if all(each["fid"] is None for each in rows):
        raise StageError(f"no way to draw gave images: {rows[0]['reason']}")
    return rows


def told(
    rows: list[dict[str, Any]],
    base: Sampler,
    n: int,
    params: _params.Params,
    extractor: _extractors.Extractor,
    run: _track.Run,
) -> dict[str, Any]:
    """What trial.json says of the rows that were `drawn`; the best of them is logged."""
    best = min((each for each in rows if each["fid"] is not None), key=lambda each: each["fid"])
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
    run.params({"axis": {"epsilon": best["epsilon"]}})
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


def spread(mean: float, std: float | None) -> str:
    """A mean with its standard deviation, if there is one, for people."""
    return f"{mean:.4g}" + (f" +- {std:.2g}" if std is not None else "")


def plot_grids(rows: Sequence[Mapping[str, Any]], files: Sequence[Path], columns: int, path: Path) -> None:
    """Draw the images that a file has for each row, under its name and the mean and spread of its FID."""
    with matplotlib.rc_context(STYLE):
        lines = -(-len(rows) // columns)
        figure = Figure(figsize=(2.5 * columns, 2.9 * lines), layout="constrained")
        for axes in figure.subplots(lines, columns, squeeze=False).flat:
            axes.axis("off")
        for axes, row, file in zip(figure.axes, rows, files, strict=False):
            x = torch.from_numpy(np.load(file))
            picture = np.asarray(grid_picture(x, math.isqrt(len(x))))
            axes.imshow(picture, cmap="gray", interpolation="nearest", vmin=0, vmax=255)
            axes.set_title(f"{row['name']}\nFID {spread(row['mean'], row['std'])}", fontsize=9)
        figure.savefig(path, dpi=130, bbox_inches="tight")


@contextmanager
def _watched(folder: Path, total: int, what: str) -> Iterator[None]:
    """Show how many trials have ended, and the best FID so far."""
    over = threading.Event()

    def watch() -> None:
        with _stage.progress(total, "trial", what) as bar:
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
