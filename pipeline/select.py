"""Choose the checkpoint whose averaged weights are drawn from.

select.rule=last  the last one
select.rule=fid   the one with the lowest FID: of each checkpoint that the training has kept (train.keep_every) select.n
                  images are drawn and compared with the training images, as the papers do with 1,000 every 5,000 steps

Reads out/train, the run's checkpoints in runtime.storage, out/features and the sections `select`, `sample` and
`evaluate`; writes out/select: selection.json, and of the rule `fid` ema.safetensors and selection.png. The images have
numbers from 2^32 on, other noise than those that are judged later: a checkpoint that was lucky with some images is not
given credit for them.
"""

import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from safetensors.torch import save_file

from ncsn.metrics import Moments, frechet_distance
from pipeline import _checkpoints, _extractors, _params, _ray, _reference, _shards, _stage, _track, train
from pipeline._pictures import STYLE
from pipeline._sampler import of_model
from pipeline._stage import StageError, log
from pipeline._store import read_json, replacing_folder, sha256, store, write_json

OUT = Path("out/select")
FIRST = 2**32  # number of the first image


def main(params: _params.Params) -> None:
    model = read_json(train.OUT / "model.json")
    if params.select.rule == "last":
        with replacing_folder(OUT) as out:
            write_json(
                out / "selection.json", {"rule": "last", "step": model["step"], "sha256": model["sha256"]["ema"]}
            )
        log.info("step %d, the last", model["step"])
        return
    extractor = _extractors.choose(params.evaluate)
    if extractor is None:
        raise StageError(
            "select.rule='fid' needs features: the data has no labels to train a classifier on, and there are no "
            "Inception weights: name the file with evaluate.inception_weights=PATH, or set select.rule=last"
        )
    with (
        _track.run(params, later=True) as run,
        tempfile.TemporaryDirectory() as folder,
        _ray.cluster(params.runtime),
        replacing_folder(OUT) as out,
    ):
        candidates = find(model, params.runtime, Path(folder))
        for each, fid in zip(candidates, judge(candidates, Path(folder), model, extractor, params), strict=True):
            each["fid"] = fid
        best = min(candidates, key=lambda each: (each["fid"], -each["step"]))
        (Path(folder) / f"{best['step']}.safetensors").rename(out / "ema.safetensors")
        record = {
            "rule": "fid",
            "n": params.select.n,
            "seed": params.select.seed,
            "first": FIRST,
            "extractor": {"name": extractor.name, "weights_sha256": extractor.sha256},
            "candidates": candidates,
            "step": best["step"],
            "sha256": best["sha256"],
        }
        write_json(out / "selection.json", record)
        plot(candidates, best, out / "selection.png")
        run.history([(each["step"], {"select/fid": each["fid"]}) for each in candidates])
        run.artifact(out / "selection.json", "select")
        run.artifact(out / "selection.png", "select")
    log.info("step %d of %s: FID %.4g of %d images", best["step"], steps(candidates), best["fid"], params.select.n)


def chosen() -> dict[str, Any]:
    """What selection.json says: the rule, the step and the SHA-256 of the weights; of `fid` all candidates, too.

    Raises:
        StageError: If nothing was selected, or among the checkpoints of another training.
    """
    path = OUT / "selection.json"
    if not path.is_file():
        raise StageError(f"{path} does not exist: write it with `dvc repro select`")
    content: dict[str, Any] = read_json(path)
    if content["rule"] == "last" and content["sha256"] != train.weights_sha256():
        raise StageError(f"{path} is of another training than out/train: write it anew with `dvc repro select`")
    return content


def weights() -> Path:
    """The file of the chosen averaged weights."""
    return train.OUT / "ema.safetensors" if chosen()["rule"] == "last" else OUT / "ema.safetensors"


def rule() -> dict[str, Any]:
    """How the checkpoint was chosen, for passports."""
    content = chosen()
    if content["rule"] == "last":
        return {"rule": "last"}
    told = {key: content[key] for key in ("rule", "n", "seed", "first")}
    return told | {"extractor": content["extractor"]["name"], "steps": steps(content["candidates"])}


def steps(candidates: list[dict[str, Any]]) -> list[int]:
    """The steps of all candidates."""
    return [each["step"] for each in candidates]


def find(model: dict[str, Any], runtime: _params.Runtime, folder: Path) -> list[dict[str, Any]]:
    """The sound checkpoints of the training, but for its start: step, loss on test images, hash of the weights.

    The averaged weights are written to STEP.safetensors in a folder.

    Raises:
        StageError: If there is none.
    """
    if "source" in model:
        raise StageError("select.rule='fid': out/train was fetched, it is one checkpoint alone: set select.rule=last")
    place = store(runtime.storage) / f"train-{model['fingerprint']}"
    found = []
    for step in sorted(_checkpoints.steps(place)):
        if step == 0:
            continue
        try:
            tensors, about = _checkpoints.read(place, step), _checkpoints.about(place, step)
        except _checkpoints.DamagedError as error:
            log.warning("%s, so it is no candidate", error)
            continue
        path = folder / f"{step}.safetensors"
        save_file(train.below(tensors, "ema."), path)
        found.append({"step": step, "test_loss": about["test_loss"], "sha256": sha256(path)})
    if not found:
        raise StageError(f"select.rule='fid': no checkpoint in {place.uri}: set runtime.storage to where they are")
    return found


def judge(
    candidates: list[dict[str, Any]],
    folder: Path,
    model: dict[str, Any],
    extractor: _extractors.Extractor,
    params: _params.Params,
) -> list[float]:
    """The FID of select.n images of each candidate, whose weights `find` wrote; within a cluster."""
    orders = {
        str(each["step"]): _shards.Order(
            of_model(params, model, "ema", each["sha256"], each["step"], params.select.seed),
            folder / f"{each['step']}.safetensors",
            params.select.n,
            params.sample.shard_size,
            FIRST,
        )
        for each in candidates
    }
    _shards.draw(orders, params.runtime)
    sets = {name: _extractors.Pictures(order.n, _shards.load(order, params.runtime)) for name, order in orders.items()}
    reference, found = _reference.beside(extractor, sets, params)
    rows = (found[name].layers[extractor.layer("fid")] for name in orders)
    return [frechet_distance(Moments.of(each), reference.moments) for each in rows]


def plot(candidates: list[dict[str, Any]], best: dict[str, Any], path: Path) -> None:
    """Draw the FID over the steps, with the chosen one marked."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.subplots()
        values = np.array([(each["step"], each["fid"]) for each in candidates])
        axes.plot(*values.T, "o-", ms=4, color="C0")
        axes.plot(best["step"], best["fid"], "o", ms=9, mfc="none", color="C1", label=f"step {best['step']:,}, chosen")
        if values[:, 1].max() > 10 * values[:, 1].min() > 0:
            axes.set_yscale("log")
        axes.set(xlabel="step", ylabel="FID")
        axes.legend()
        figure.savefig(path, dpi=130)


if __name__ == "__main__":
    from pipeline import select  # since what is defined in __main__ would travel to the workers by value

    _stage.run("select", __doc__, select.main)
