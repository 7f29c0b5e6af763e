"""Draw images by annealed Langevin dynamics with the averaged weights, on Ray workers.

Reads out/train, out/schedule and the section `sample`; writes out/samples: `ema/` the samples, `untrained/` a few of
the untrained network as a yardstick, each as uint8 shards with a manifest; grid.png and denoising.gif. Image i depends
on (seed, i) alone. Finished shards wait in runs/ and are never drawn again: the same command goes on where it stopped.
"""

import functools
import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ncsn import images, random, samplers
from ncsn.networks.ncsn import TOLERANCE
from pipeline import _params, _ray, _stage, _track, prepare, schedule, train
from pipeline._pictures import grid_picture, save_gif, save_png
from pipeline._stage import StageError, log
from pipeline._store import code_digest, fingerprint, read_json, replacing, replacing_folder, sha256, write_json

OUT = Path("out/samples")
RUNS = Path("runs")  # finished shards
FRAMES = 25  # images in the animation
MOST_LEVELS = 60  # in the animation
YARDSTICK = 1_000  # images of the untrained network at most: they cost as much as samples


@dataclass(frozen=True)
class Sampler:
    """Everything that determines image i; a plain value."""

    network: dict[str, Any]
    weights: Path
    weights_sha256: str
    step: int
    schedule: dict[str, Any]
    shape: tuple[int, ...]
    denoise: bool
    seed: int
    folder: Path
    space: str = "pixels"  # what the network sees: a key of images.SPACES

    @property
    def nfe(self) -> int:
        """Network evaluations an image."""
        return int(self.schedule["L"] * self.schedule["steps_per_level"] + self.denoise)


class Drawer:
    """A sampler with its network loaded."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = train.build(sampler.network)
        network.load_state_dict(load_file(sampler.weights))
        self.network = network.eval().to(self.device).to(memory_format=torch.channels_last)
        self.sigmas = torch.tensor(sampler.schedule["sigmas"], dtype=torch.float64)
        self.to_space, self.to_pixels = images.SPACES[sampler.space]

    def draw(self, index: Tensor, observe: samplers.Observe | None = None) -> Tensor:
        """Images with these numbers, uint8, shape (B, C, H, W)."""
        return images.to_uint8(self.langevin(index, observe=observe)).cpu()

    def langevin(
        self,
        index: Tensor,
        *,
        noise: samplers.Noise | None = None,
        project: samplers.Project | None = None,
        observe: samplers.Observe | None = None,
    ) -> Tensor:
        """Images with these numbers in pixel units, not clamped, float32, shape (B, C, H, W), on the drawer's device.

        Args:
            index: Image numbers, shape (B,).
            noise: In place of that of (seed, number); see `ncsn.samplers`.
            project: Puts in what is known, in the network's space (`to_space`).
            observe: Sees the images in pixel units.

        Raises:
            StageError: If an image is not finite.
        """
        s = self.sampler
        index = index.to(self.device)
        x = samplers.annealed_langevin(
            self.network,
            self.to_space(random.start_images(s.seed, index, s.shape)),
            self.sigmas,
            epsilon=s.schedule["epsilon"],
            steps_per_level=s.schedule["steps_per_level"],
            denoise=s.denoise,
            noise=noise or random.seeded_noise(s.seed, index),
            project=project,
            observe=observe and (lambda x, step, sigma: observe(self.to_pixels(x), step, sigma)),
        )
        if not x.isfinite().all():
            raise StageError(
                f"images are not finite with noise.epsilon={s.schedule['epsilon']:.4g} (Langevin steps diverge from "
                f"2 sigma_L^2 = {2 * float(self.sigmas[-1]) ** 2:.4g} on, or sooner): lower it, then dvc repro"
            )
        return self.to_pixels(x)

    def __call__(self, shard: tuple[int, int]) -> None:
        """Draw images first..last-1 into a file, with its hash in a file beside it, written last."""
        first, last = shard
        path = shard_path(self.sampler.folder, shard)
        with replacing(path) as part, open(part, "wb") as file:
            np.save(file, self.draw(torch.arange(first, last)).numpy())
        write_json(path.with_suffix(".json"), {"sha256": sha256(path)})


def main(params: _params.Params) -> None:
    yardstick = min(params.sample.n, prepare.manifest()["splits"]["test"]["n"], YARDSTICK)
    count = {"ema": params.sample.n, "untrained": yardstick}
    blocks = {kind: shards(n, params.sample.shard_size) for kind, n in count.items()}
    with _track.run(params) as run:
        drawn = {kind: make_sampler(params, kind) for kind in count}
        with _ray.cluster(params.runtime):
            draw_all(drawn, blocks, run, params.runtime)
        log.info("drawing the animation")
        frames = animate(drawn["ema"], min(FRAMES, params.sample.n))
        with replacing_folder(OUT) as out:
            for kind, sampler in drawn.items():
                publish(sampler, blocks[kind], out / kind)
            picture = grid_picture(torch.from_numpy(load(out / "ema")[:100]), columns=10)
            save_png(picture, out / "grid.png")
            save_gif(frames, 5, out / "denoising.gif")
        run.image(np.asarray(picture), "samples", int(manifest(OUT / "ema")["step"]))
        run.artifact(OUT / "grid.png", "samples")
        run.artifact(OUT / "denoising.gif", "samples")


def load(folder: Path = OUT / "ema") -> np.ndarray:
    """All images of a folder of shards, uint8, shape (n, C, H, W), in the order of their numbers."""
    return np.concatenate([np.load(folder / shard["file"]) for shard in manifest(folder)["shards"]])


def manifest(folder: Path = OUT / "ema") -> dict[str, Any]:
    """What the folder holds and how it was drawn."""
    content: dict[str, Any] = read_json(folder / "manifest.json")
    return content


def make_sampler(params: _params.Params, kind: str) -> Sampler:
    """The sampler of the averaged ("ema") or initial ("untrained") weights; its folder's name hashes all of it."""
    model, levels, shape = read_json(train.OUT / "model.json"), schedule.load(), prepare.manifest()["shape"]
    name = {"ema": "ema", "untrained": "initial"}[kind]
    train.check(model["network"], shape)
    own = model["network"].get("sigmas", levels["sigmas"])
    if not same_levels(own, levels["sigmas"]):
        raise StageError(
            f"out/schedule has {levels['L']} levels from {levels['sigma_1']:.6g} to {levels['sigma_L']:.6g}, but the "
            f"{model['network']['name']} in out/train knows none but its own {len(own)} from {own[0]:.6g} to "
            f"{own[-1]:.6g}: set noise.* to these, or train it anew"
        )
    identity = {
        "network": model["network"],
        "space": model["space"],
        "shape": shape,
        "weights": model["sha256"][name],
        "schedule": {key: levels[key] for key in ("sigmas", "epsilon", "steps_per_level")},
        "sample": {"denoise": params.sample.denoise, "seed": params.sample.seed},
        "code": code_digest("ncsn/networks", "ncsn/samplers.py", "ncsn/random.py", "ncsn/noise.py", "ncsn/images.py"),
    }
    return Sampler(
        network=model["network"],
        weights=(train.OUT / f"{name}.safetensors").resolve(),
        weights_sha256=model["sha256"][name],
        step=model["step"] if kind == "ema" else 0,
        schedule=levels,
        shape=tuple(shape),
        denoise=params.sample.denoise,
        seed=params.sample.seed,
        space=model["space"],
        folder=(RUNS / f"sample-{fingerprint(identity)}").resolve(),
    )


def same_levels(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two ladders are one, up to what NCSN tolerates."""
    return len(a) == len(b) and np.allclose(a, b, rtol=TOLERANCE, atol=0)


def shards(n: int, size: int) -> list[tuple[int, int]]:
    """Fixed blocks of image numbers, (first, last + 1)."""
    return [(first, min(first + size, n)) for first in range(0, n, size)]


def shard_path(folder: Path, shard: tuple[int, int]) -> Path:
    """Where a shard's images lie."""
    return folder / f"shard_{shard[0]:06d}_{shard[1]:06d}.npy"


def is_done(folder: Path, shard: tuple[int, int]) -> bool:
    """Whether a shard is there and its content has the hash that was recorded."""
    path = shard_path(folder, shard)
    note = path.with_suffix(".json")
    if not (path.is_file() and note.is_file()):
        return False
    if sha256(path) == read_json(note)["sha256"]:
        return True
    log.warning("%s is damaged and drawn again", path)
    return False


@dataclass(frozen=True)
class Pool:
    """Makes the function of a worker: from (kind, shard) to a finished file; a network is loaded when first needed."""

    samplers: dict[str, Sampler]

    def __call__(self) -> Callable[[tuple[str, tuple[int, int]]], None]:
        drawer = functools.cache(lambda kind: Drawer(self.samplers[kind]))
        return lambda job: drawer(job[0])(job[1])


def draw_all(
    drawn: dict[str, Sampler],
    blocks: dict[str, list[tuple[int, int]]],
    run: _track.Run,
    runtime: _params.Runtime,
) -> None:
    """Draw the shards of all samplers that are not there yet, with a progress bar in images."""
    jobs = [(kind, block) for kind in drawn for block in blocks[kind] if not is_done(drawn[kind].folder, block)]
    total = sum(parts[-1][1] for parts in blocks.values())
    missing = sum(last - first for _, (first, last) in jobs)
    for kind, sampler in drawn.items():
        log.info("%s: %d images, %d NFE each, in %s", kind, blocks[kind][-1][1], sampler.nfe, sampler.folder)
    start = time.monotonic()
    with tqdm(total=total, initial=total - missing, unit="image", desc="sample") as bar:
        for (_, (first, last)), _ in _ray.shards(Pool(drawn), jobs, runtime):
            bar.update(last - first)
    if missing:
        run.metrics({"sample/images_per_second": missing / (time.monotonic() - start)})


def animate(sampler: Sampler, n: int) -> list[Tensor]:
    """The first n images at the end of noise levels, and after the denoising step: uint8, (n, C, H, W) each.

    Of more than MOST_LEVELS levels every second, third and so on counts, such that the last one does.
    """
    frames: list[Tensor] = []
    L, T = sampler.schedule["L"], sampler.schedule["steps_per_level"]
    every = -(-L // MOST_LEVELS) * T

    def observe(x: Tensor, step: int, sigma: float) -> None:
        if (L * T - 1 - step) % every == 0:
            frames.append(images.to_uint8(x).cpu())

    final = Drawer(sampler).draw(torch.arange(n), observe)
    return [*frames, final]


def publish(sampler: Sampler, blocks: list[tuple[int, int]], folder: Path) -> None:
    """Copy the shards into a folder, with their manifest."""
    folder.mkdir()
    entries = []
    for first, last in blocks:
        path = shard_path(sampler.folder, (first, last))
        shutil.copyfile(path, folder / path.name)
        entries.append({"file": path.name, "first": first, "last": last - 1, "sha256": sha256(folder / path.name)})
    levels = sampler.schedule
    write_json(
        folder / "manifest.json",
        {
            "n": blocks[-1][1],
            "shape": sampler.shape,
            "seed": sampler.seed,
            "weights": "ema" if sampler.step else "initial",
            "weights_sha256": sampler.weights_sha256,
            "step": sampler.step,
            "sampler": {
                "name": "annealed_langevin",
                **{key: levels[key] for key in ("spacing", "sigma_1", "sigma_L", "L", "steps_per_level", "epsilon")},
                "denoise": sampler.denoise,
            },
            "nfe": sampler.nfe,
            "shards": entries,
            "sha256": hashlib.sha256("".join(str(entry["sha256"]) for entry in entries).encode()).hexdigest(),
        },
    )


if __name__ == "__main__":
    _stage.run("sample", __doc__, main)
