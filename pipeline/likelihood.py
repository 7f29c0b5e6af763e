"""Tell how likely the network finds real images: bits for each value of a pixel, by the probability flow ODE.

log p of an image follows from the ODE that leads it to noise and from how that changes volumes on the way, estimated by
random probes (arXiv:2011.13456, section 4.3); less bits are better, and 8 is knowing nothing. The bytes are dequantised
uniformly, so the bits bound those of the bytes themselves (arXiv:1511.01844). Test images are judged, and as many
training images: where the latter have fewer bits, the network remembers them. Beside them stand the bits of pixels that
do not know of each other, each with its histogram over the training images.

The density is that at sigma_L, blurred by so much: by an exact score no image would have less than
log2(256 sqrt(2 pi) sigma_L) bits, 5.0 with the 0.05 of digits. So bits can be compared for one sigma_L alone;
noise.sigma_L=0.01, or less, is for this.

Reads out/data, out/schedule, out/select, out/train; writes out/likelihood: likelihood.json (each number with what it
was computed from), likelihood.png. Image i is judged in the same way on any worker; finished blocks wait in
runtime.storage: the same command goes on where it stopped.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ncsn import images, random
from ncsn.likelihood import bits_per_dim, log_likelihood
from pipeline import _params, _ray, _stage, _track, prepare, sample, select, train
from pipeline._pictures import STYLE
from pipeline._sampler import Model, Reverse, Sampler, by_langevin
from pipeline._stage import StageError, log
from pipeline._store import Store, code_digest, fingerprint, replacing_folder, store, write_json

OUT = Path("out/likelihood")
SPLITS = ("test", "train")
BLOCK = 50  # images that are judged together
SHOWN = 12  # images at either end of the likelihoods
RANGES = {"pixels": 1.0, "centred": 2.0}  # of images in a network's space
CODE = (
    *("ncsn/networks", "ncsn/likelihood.py", "ncsn/ode.py", "ncsn/random.py", "ncsn/images.py", "ncsn/sde.py"),
    *("pipeline/_sampler.py", "pipeline/likelihood.py"),
)

Job = tuple[str, int, int]  # a split; the numbers of the first of its chosen images and of the first that is no more


@dataclass(frozen=True)
class Judge:
    """All that the bits of an image depend on; a plain value.

    Args:
        base: Names the network, its space and its levels.
        chosen: Numbers of the images, by split.
        passes: How often each image is dequantised and judged, the mean counts.
        probes: Directions for each estimate of a trace.
        tolerance: Of the ODE, absolute and relative.
        seed: Of dequantisation and probes.
    """

    base: Sampler
    chosen: Mapping[str, np.ndarray]
    passes: int
    probes: int
    tolerance: float
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """For passports."""
        reverse = Reverse.of(self.base.schedule)
        return {
            "dequantisation": "uniform",
            "passes": self.passes,
            "probes": self.probes,
            "probe": "Rademacher",
            "tolerance": self.tolerance,
            "seed": self.seed,
            "sde": repr(reverse.sde),
            "t_min": reverse.t_min,
        }

    @property
    def jobs(self) -> list[Job]:
        """Blocks of images."""
        return [
            (split, first, min(first + BLOCK, len(rows)))
            for split, rows in self.chosen.items()
            for first in range(0, len(rows), BLOCK)
        ]

    def bits(self, model: Model, split: str, rows: Tensor, pixels: Tensor) -> Tensor:
        """Bits a value and evaluations of each image, means over the passes, float64, shape (B, 2).

        Args:
            model: The network.
            split: Of the images.
            rows: Their numbers in it, shape (B,).
            pixels: Their bytes, uint8, shape (B, C, H, W).
        """
        reverse, shape = Reverse.of(self.base.schedule), pixels.shape[1:]
        to_space, _ = images.SPACES[self.base.space]
        network = reverse.score(model.module)
        # The splits have numbers of their own, so that no test image shares its noise with a training image.
        number = rows + SPLITS.index(split) * 2**32
        found = []
        for k in range(self.passes):
            u = random.uniform(self.seed, random.DEQUANTISE, number, k, shape)
            probes = random.signs(self.seed, random.PROBE, number, k, (self.probes, *shape)).transpose(0, 1)
            x = reverse.inside(to_space(images.dequantise(images.to_float(pixels), u)))
            log_prob, _, evaluations = log_likelihood(
                network, x, reverse.sde, probes, t_min=reverse.t_min, rtol=self.tolerance, atol=self.tolerance
            )
            bits = bits_per_dim(log_prob.double(), math.prod(shape), width=RANGES[self.base.space] / reverse.unit)
            found.append(torch.stack([bits, evaluations.double()], 1))
        return torch.stack(found).mean(0)


@dataclass(frozen=True)
class _Pool:
    """Makes the function of a worker: from a block of images to nothing; it writes what it has found."""

    judge: Judge
    weights: _ray.Shared
    data: Mapping[str, _ray.Shared]  # by split
    place: Store
    runtime: _params.Runtime

    def __call__(self) -> Callable[[Job], None]:
        base = self.judge.base
        model = Model(base.network, self.weights.open(), "fp32", self.runtime)

        def work(job: Job) -> None:
            split, first, last = job
            rows, source = self.judge.chosen[split][first:last], self.data[split].open()

            def bits(part: Tensor) -> Tensor:
                some = rows[part.numpy()]
                pixels = torch.from_numpy(np.array(source[some])).to(model.device)
                return self.judge.bits(model, split, torch.tensor(some, device=model.device), pixels).cpu()

            try:
                found = model(bits, torch.arange(len(rows)), base.shape)
            except ArithmeticError as error:
                raise StageError(f"{error}: raise --tolerance {self.judge.tolerance:g}") from error
            self.place.write(_name(job), json.dumps(found.tolist()).encode())

        return work


def main(params: _params.Params, *, n: int, passes: int, probes: int, tolerance: float) -> None:
    if n < 2:
        raise StageError(f"--n {n}: expected at least 2 images")
    for name, value in (("passes", passes), ("probes", probes), ("tolerance", tolerance)):
        if not 0 < value < math.inf:
            raise StageError(f"--{name} {value:g}: expected a number > 0")
    base = sample.make_sampler(dataclasses.replace(params, sample=by_langevin(params.sample)), "ema")
    check(base)
    seed = params.evaluate.seed
    data = {split: prepare.load(split)[0] for split in SPLITS}
    chosen = {s: np.sort(np.random.default_rng(seed).permutation(len(x))[:n]) for s, x in data.items()}
    judge = Judge(base, chosen, passes, probes, tolerance, seed)
    with _track.run(params, afterwards=train.weights_sha256()) as run, replacing_folder(OUT) as out:
        with _ray.cluster(params.runtime):
            found = bits_of(judge, params)
        passports = [passport(judge, split, values) for split, values in found.items()]
        blur = base.schedule["sigma_L"] / RANGES[base.space]
        alone = independent_bits(data["train"], data["test"][judge.chosen["test"]], blur)
        write_json(out / "likelihood.json", {"passports": passports, "independent_pixels": alone})
        plot(judge, found, data["test"], alone, out / "likelihood.png")
        run.metrics({f"likelihood/{each['name']}": each["value"] for each in passports})
        run.artifact(out, "likelihood")
    for each in passports:
        told = f"{each['value']:.4f} +- {each['std_error']:.4f} bits a value, {each['nfe']:.0f} evaluations an image"
        log.info("%d %s images: %s", each["n"], each["set"], told)
    log.info("test images by pixels that do not know of each other: %.4f", alone)


def check(base: Sampler) -> None:
    """Raise StageError if there is no flow through the network's levels, or no density of pixels."""
    if "sigmas" in base.network:
        raise StageError(f"the {base.network['name']} in out/train knows no levels between its own: it has no flow")
    if base.space not in RANGES:
        raise StageError(f"train.space={base.space}: expected {' or '.join(RANGES)}, whose volumes are those of pixels")


def bits_of(judge: Judge, params: _params.Params) -> dict[str, np.ndarray]:
    """Bits a value and evaluations of each chosen image, shape (N, 2), by split; within a cluster, with a progress bar.

    Raises:
        StoppedError: After a signal; finished blocks stay.
    """
    splits, runtime = prepare.manifest()["splits"], params.runtime
    identity = {
        "network": judge.base.network,
        "space": judge.base.space,
        "weights": judge.base.weights_sha256,
        "levels": {key: judge.base.schedule.get(key) for key in ("sigma_1", "sigma_L", "sde")},
        "data": {split: splits[split]["sha256"] for split in judge.chosen},
        "chosen": {split: rows.tolist() for split, rows in judge.chosen.items()},
        "settings": judge.settings,
        "code": code_digest(*CODE),
    }
    storage = store(runtime.storage)
    storage.check()
    place = storage / f"likelihood-{fingerprint(identity)}"
    there = set(place.names())
    todo = [job for job in judge.jobs if _name(job) not in there]
    data = {s: _ray.share(prepare.OUT / f"{s}.npy", splits[s]["sha256"], runtime) for s in judge.chosen}
    pool = _Pool(judge, _ray.put(sample.weights("ema").read_bytes()), data, place, runtime)
    total = sum(map(len, judge.chosen.values()))
    left = sum(last - first for _, first, last in todo)
    with _stage.StopSignals(), _stage.progress(total, "image", "judge", total - left) as bar:
        for (_, first, last), _ in _ray.shards(pool, todo, runtime):
            bar.update(last - first)
    read = {job: np.array(json.loads(place.read(_name(job)))) for job in judge.jobs}
    return {split: np.concatenate([found for job, found in read.items() if job[0] == split]) for split in judge.chosen}


def passport(judge: Judge, split: str, found: np.ndarray) -> dict[str, Any]:
    """The mean of a split's bits, and all there is to know of it."""
    bits, evaluations = found.T
    if not np.isfinite(bits).all():
        raise StageError(f"the bits of {split} images are not finite: look at the network's samples")
    data = prepare.manifest()
    return {
        "name": f"bits_per_dim_{data['name']}_{split}_{len(bits)}",
        "metric": "bits_per_dim",
        "set": split,
        "value": float(bits.mean()),
        "std_error": float(bits.std(ddof=1) / math.sqrt(len(bits))),
        "n": len(bits),
        "nfe": float(evaluations.mean()),  # each with a backward pass for each probe
        "settings": judge.settings,
        "data": {"name": data["name"], "split": split, "sha256": data["splits"][split]["sha256"]},
        "checkpoint": {"sha256": judge.base.weights_sha256, "step": judge.base.step, "selection": select.rule()},
        "code": {"revision": _track.revision(), "digest": code_digest("ncsn", "pipeline")},
    }


def independent_bits(x: np.ndarray, judged: np.ndarray, blur: float) -> float:
    """Bits a value of uint8 images (M, C, H, W) by the histogram of each value over the images x, each count one more.

    A yardstick: it knows where ink is likely, and nothing of shapes. Like the network it says how likely an image is
    among blurred ones, by Gaussian noise of the standard deviation `blur`, images in [0, 1].
    """
    flat, other = x.reshape(len(x), -1), judged.reshape(len(judged), -1)
    distance = np.subtract.outer(np.arange(256), np.arange(256)) / 256
    density = np.exp(-0.5 * (distance / blur) ** 2) / (math.sqrt(2 * math.pi) * blur)  # at one value from another
    bits = [
        8 - np.log2(density @ (np.bincount(values, minlength=256) + 1.0) / (len(x) + 256))[seen].mean()
        for values, seen in zip(flat.T, other.T, strict=True)
    ]
    return float(np.mean(bits))


def plot(judge: Judge, found: dict[str, np.ndarray], test: np.ndarray, alone: float, path: Path) -> None:
    """Draw how the bits are spread, and the test images with the fewest and the most."""
    order = found["test"][:, 0].argsort()
    shown = min(SHOWN, len(order) // 2)
    ends = test[judge.chosen["test"]][np.concatenate([order[:shown], order[::-1][:shown]])]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=(1.6, 1))
        bins = np.histogram_bin_edges(np.concatenate([each[:, 0] for each in found.values()]), 40).tolist()
        for split, values in found.items():
            label = f"{len(values)} {split} images, mean {values[:, 0].mean():.3f}"
            above.hist(values[:, 0], bins, histtype="step", lw=1.6, label=label)
        above.axvline(alone, color="0.6", lw=1, ls="--", label=f"independent pixels, {alone:.3f}")
        above.set(xlabel="bits a value", ylabel="images")
        above.legend(fontsize=8)
        tiles = images.grid(torch.from_numpy(np.ascontiguousarray(ends)), shown).permute(1, 2, 0).numpy()
        below.imshow(tiles, cmap="gray", interpolation="nearest")
        height = tiles.shape[0]
        below.set_yticks([height / 4, 3 * height / 4], ["fewest bits", "most bits"])
        below.set_xticks([])
        below.grid(False)
        below.spines[:].set_visible(False)
        figure.savefig(path, dpi=130)


def _name(job: Job) -> str:
    split, first, last = job
    return f"{split}_{first:06d}_{last:06d}.json"


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=200, help="images of each split (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=1, help="dequantisations of each (default: %(default)s)")
    parser.add_argument("--probes", type=int, default=1, help="for each trace (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of the ODE (default: %(default)s)")


if __name__ == "__main__":
    from pipeline import likelihood as this  # since what is defined in __main__ would travel to the workers by value

    _stage.run("likelihood", __doc__, this.main, _options)
