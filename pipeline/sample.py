"""Draw images by annealed Langevin dynamics, or another sampler, on a pool of Ray workers.

sample=default             annealed Langevin dynamics (arXiv:1907.05600, arXiv:2006.09011)
sample=consistent          consistent annealed sampling (arXiv:2009.05475)
sample=dpmpp_sde           the reverse SDE by DPM-Solver++ (arXiv:2211.01095): the same network, far fewer evaluations
sample=dpmpp, heun, euler  the probability flow, which has no noise but that of the start
sample=ode                 the same with steps as long as a tolerance allows (RK45): each image takes its own number
sample=pc                  predictor and corrector of the reverse SDE (arXiv:2011.13456)

Reads out/train, out/select, out/schedule and the section `sample`; writes out/samples: `ema/` the samples, `untrained/`
a few of the untrained network as a yardstick, each as uint8 shards with a manifest; grid.png and denoising.gif. Image i
depends on (seed, i) alone. Finished shards wait in runtime.storage and are never drawn again: the same command goes on
where it stopped, and draws anew what is damaged.

--verify 16 draws nothing new: it draws 16 images of out/samples once more and compares.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import _params, _ray, _shards, _stage, _track, prepare, select, train
from pipeline._pictures import grid_picture, save_gif, save_png
from pipeline._sampler import Drawer, Sampler, of_model
from pipeline._stage import StageError, log
from pipeline._store import read_json, replacing_folder, sha256

OUT = Path("out/samples")
FRAMES = 25  # images in the animation
YARDSTICK = 1_000  # images of the untrained network at most: they cost as much as samples
TOLERATED = {"fp32": 0.05, "tf32": 2.0, "bf16": 2.0}  # mean difference of pixels, of 255, of an image drawn again


def main(params: _params.Params, *, verify: int | None = None) -> None:
    orders = make_orders(params)
    if verify is not None:
        check_again(orders, params, verify)
        return
    with _track.run(params, later=True) as run:
        with _ray.cluster(params.runtime):
            drawn = _shards.draw(orders, params.runtime)
        with replacing_folder(OUT) as out:
            for kind, order in orders.items():
                ranges = params.sample.ranges if kind == "ema" else 1
                selection = select.rule() if kind == "ema" else None
                about = {"n": order.n // ranges, "ranges": ranges, "selection": selection}
                _shards.publish(order, params.runtime, out / kind, about)
            picture = grid_picture(torch.from_numpy(load(out / "ema")[:100]), columns=10)
            save_png(picture, out / "grid.png")
            save_gif(drawn.frames["ema"], 5, out / "denoising.gif")
        if drawn.pace:
            run.metrics({"sample/images_per_second": drawn.pace})
        run.image(np.asarray(picture), "samples", int(manifest(OUT / "ema")["step"]))
        run.artifact(OUT / "grid.png", "samples")
        run.artifact(OUT / "denoising.gif", "samples")


def load(folder: Path = OUT / "ema") -> np.ndarray:
    """All images of a folder of shards, uint8, shape (N, C, H, W), in the order of their numbers."""
    return np.concatenate([np.load(folder / shard["file"]) for shard in manifest(folder)["shards"]])


def manifest(folder: Path = OUT / "ema") -> dict[str, Any]:
    """What the folder holds, n images in each of its ranges, and how they were drawn."""
    content: dict[str, Any] = read_json(folder / "manifest.json")
    return content


def make_orders(params: _params.Params) -> dict[str, _shards.Order]:
    """What this stage draws: samples, and as a yardstick images of the untrained network."""
    p = params.sample
    count = {"ema": p.n * p.ranges, "untrained": min(p.n, prepare.manifest()["splits"]["test"]["n"], YARDSTICK)}
    orders = {}
    for kind, n in count.items():
        sampler, frames = make_sampler(params, kind), min(FRAMES, n) if kind == "ema" else 0
        orders[kind] = _shards.Order(sampler, weights(kind), n, p.shard_size, frames=frames)
    return orders


def weights(kind: str) -> Path:
    """The file of the chosen averaged ("ema") or initial ("untrained") weights."""
    return select.weights() if kind == "ema" else train.OUT / "initial.safetensors"


def make_sampler(params: _params.Params, kind: str) -> Sampler:
    """The sampler of the chosen averaged ("ema") or initial ("untrained") weights."""
    model = read_json(train.OUT / "model.json")
    if kind == "untrained":
        return of_model(params, model, "initial", model["sha256"]["initial"], 0, params.sample.seed)
    chosen = select.chosen()
    return of_model(params, model, "ema", chosen["sha256"], chosen["step"], params.sample.seed)


def check_again(orders: dict[str, _shards.Order], params: _params.Params, n: int) -> None:
    """Hash all shards of out/samples, draw n random images of each set once more and compare.

    In another batch, or on another kind of processor, sums are added up in another order: a pixel may end a grey level
    off, and with the products of tf32 and bf16 a few. So expected is a mean difference of pixels below
    `TOLERATED[precision]`, while another image differs by tens.

    Raises:
        StageError: If a shard is not what the manifest says, or an image is another one.
    """
    for kind, order in orders.items():
        folder = OUT / kind
        told, expected = manifest(folder), order.sampler
        settings = {"weights_sha256": expected.weights_sha256, "seed": expected.seed, "sampler": expected.settings}
        for field, value in settings.items():
            if told[field] != value:
                raise StageError(f"{folder} was drawn with {field}={told[field]}, not {value}: draw anew by dvc repro")
        for shard in told["shards"]:
            if sha256(folder / shard["file"]) != shard["sha256"]:
                raise StageError(f"{folder / shard['file']} is damaged: get it back with `dvc checkout` or `dvc repro`")
        published = load(folder)
        index = np.sort(np.random.default_rng().choice(len(published), min(n, len(published)), replace=False))
        again = Drawer.of(expected, order.weights, params.runtime).draw(torch.from_numpy(index)).numpy()
        difference = np.abs(again.astype(int) - published[index].astype(int)).reshape(len(index), -1)
        mean, same = difference.mean(axis=1), int((difference.max(axis=1) == 0).sum())
        log.info(
            "%s: %d of %d images drawn again, %d of them to the same bytes; pixels differ by %d of 255 at most, those "
            "of an image by %.3g on average at most",
            *(kind, len(index), len(published), same, difference.max(), mean.max()),
        )
        if mean.max() > (limit := TOLERATED[expected.precision]):
            raise StageError(
                f"{folder}: image {index[mean.argmax()]} drawn again is another one: its pixels differ by "
                f"{mean.max():.3g} of 255 on average, expected at most {limit} with sample.precision="
                f"{expected.precision}: draw all anew by dvc repro --force sample"
            )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verify", type=int, metavar="N", help="draw N random images once more and compare")


if __name__ == "__main__":
    from pipeline import sample  # since what is defined in __main__ would travel to the workers by value

    _stage.run("sample", __doc__, sample.main, _options)
