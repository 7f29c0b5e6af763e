"""Images in fixed blocks of numbers, drawn by a pool of Ray workers into a store, each once.

A block is shard_000000_000100.npy, uint8 (n, C, H, W), with its hash in a .json file beside it, which is written last:
without it a shard does not count. Who draws a shard, and when, does not change it. How long it took is in the file too.
"""

import functools
import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncsn import images
from pipeline import _params, _ray, _stage
from pipeline._sampler import Drawer, Model, Sampler
from pipeline._stage import StageError, log
from pipeline._store import Store, store, write_json

Block = tuple[int, int]  # numbers of the first image, and of the first one that is no more
MOST_LEVELS = 60  # in an animation
READERS = 8  # shards that are read at once: a store may be far away


@dataclass(frozen=True)
class Order:
    """What is to be drawn: n images from number `first` on, and of so many the way there, as an animation."""

    sampler: Sampler
    weights: Path
    n: int
    size: int  # of a shard
    first: int = 0
    frames: int = 0

    @property
    def blocks(self) -> list[Block]:
        """The numbers of each shard's images: they do not depend on n, but for the last shard's end."""
        end = self.first + self.n
        return [(first, min(first + self.size, end)) for first in range(self.first, end, self.size)]


@dataclass(frozen=True)
class Drawn:
    """What came of drawing.

    Args:
        frames: Those that were ordered, by name.
        pace: Images drawn each second by all workers, 0 if all were there.
        failed: Why those that failed did, by name.
    """

    frames: dict[str, list[Tensor]]
    pace: float
    failed: dict[str, str]


@dataclass(frozen=True)
class _Pool:
    """Makes the function of a worker: from a name and a block to None, or without a block to frames;
    where failing is tolerated, to the reason."""

    orders: Mapping[str, Order]
    weights: Mapping[str, _ray.Shared]  # by name
    places: Mapping[str, Store]  # likewise; found by the driver, since nodes may have no sources to hash
    runtime: _params.Runtime
    tolerant: bool

    def __call__(self) -> Callable[[tuple[str, Block | None]], list[Tensor] | str | None]:
        # One network at a time: orders come one after the other.
        @functools.lru_cache(1)
        def model(name: str) -> Model:
            sampler = self.orders[name].sampler
            return Model(sampler.network, self.weights[name].open(), sampler.precision, self.runtime)

        alike = _alike(self.orders)

        def work(job: tuple[str, Block | None]) -> list[Tensor] | str | None:
            name, block = job
            order = self.orders[name]
            drawer = Drawer(order.sampler, model(alike[name]))
            if block is None:
                return animate(drawer, order.frames)
            start = time.monotonic()
            try:
                x = drawer.draw(torch.arange(*block)).numpy()
            except StageError as error:
                if self.tolerant:
                    return str(error)
                raise
            write(self.places[name], block, x, time.monotonic() - start, drawer.evaluations)
            return None

        return work


def draw(orders: Mapping[str, Order], runtime: _params.Runtime, *, tolerant: bool = False) -> Drawn:
    """Draw what is not there yet, with a progress bar in images, within `_ray.cluster`.

    Args:
        orders: By names.
        runtime: Its storage, and how the workers are to be.
        tolerant: Whether an order that fails is told of in the result, and the others are drawn.

    Raises:
        StageError: If images are not finite, memory does not suffice or workers die too often.
        StoppedError: After a signal; finished shards stay.
    """
    storage = store(runtime.storage)
    storage.check()
    places = {name: storage / order.sampler.name for name, order in orders.items()}
    todo = {name: missing(order, storage) for name, order in orders.items()}
    for name, order in orders.items():
        there = order.n - sum(last - first for first, last in todo[name])
        each = "NFE as rk45 chooses" if order.sampler.nfe is None else f"{order.sampler.nfe:,} NFE each"
        what = f"{order.n:,} images, {each}" + (f", {there:,} there already" if there else "")
        log.info("%s: %s, in %s", name, what, places[name].uri)
    jobs = [(name, block) for name in orders for block in [*todo[name], *([None] if orders[name].frames else [])]]
    total, left = sum(order.n for order in orders.values()), sum(b - a for blocks in todo.values() for a, b in blocks)
    needed = {_alike(orders)[name] for name, _ in jobs}
    weights = {name: _ray.put(orders[name].weights.read_bytes()) for name in needed}
    frames, failed, start = {}, {}, time.monotonic()
    with _stage.StopSignals(), _stage.progress(total, "image", "draw", total - left) as bar:
        for (name, block), found in _ray.shards(_Pool(orders, weights, places, runtime, tolerant), jobs, runtime):
            if isinstance(found, str):
                failed[name] = found
            elif found is not None:
                frames[name] = found
            else:
                bar.update(block[1] - block[0])
    return Drawn(frames, left / (time.monotonic() - start), failed)


def missing(order: Order, storage: Store) -> list[Block]:
    """The blocks of which there is no sound shard; damaged ones are reported."""
    place = storage / order.sampler.name
    names = set(place.names())
    there = [block for block in order.blocks if {_name(block), _note(block)} <= names]
    with ThreadPoolExecutor(READERS) as pool:
        sound = dict(zip(there, pool.map(lambda block: _read(place, block) is not None, there), strict=True))
    return [block for block in order.blocks if not sound.get(block)]


def write(place: Store, block: Block, x: np.ndarray, seconds: float, evaluations: int) -> None:
    """Store a shard: its images, uint8, then their hash, and how long and how many evaluations it took to draw them."""
    file = io.BytesIO()
    np.save(file, x)
    content = file.getvalue()
    place.write(_name(block), content)
    about = {"first": block[0], "last": block[1] - 1, "sha256": hashlib.sha256(content).hexdigest()}
    about |= {"seconds": round(seconds, 4), "evaluations": evaluations}
    place.write(_note(block), (json.dumps(about, indent=2) + "\n").encode())


def load(order: Order, runtime: _params.Runtime) -> np.ndarray:
    """The images of an order that was drawn, uint8 (n, C, H, W); raises StageError if a shard is damaged."""
    place = store(runtime.storage) / order.sampler.name
    with ThreadPoolExecutor(READERS) as pool:
        parts = pool.map(lambda block: np.load(io.BytesIO(_sound(place, block))), order.blocks)
        return np.concatenate(list(parts))


def seconds(order: Order, runtime: _params.Runtime) -> float:
    """What the workers spent on the shards of an order that was drawn, added up."""
    return float(sum(note["seconds"] for note in _notes(order, store(runtime.storage))))


def nfe(order: Order, runtime: _params.Runtime) -> float:
    """Network evaluations for each image of an order that was drawn: their mean, where they differ."""
    if order.sampler.nfe is not None:
        return order.sampler.nfe
    return round(sum(note["evaluations"] for note in _notes(order, store(runtime.storage))) / order.n, 2)


def publish(order: Order, runtime: _params.Runtime, folder: Path, about: dict[str, Any]) -> None:
    """Copy the shards of an order that was drawn into a new folder, with a manifest, which has one hash over all."""
    place, sampler = store(runtime.storage) / order.sampler.name, order.sampler
    folder.mkdir()

    def copy(block: Block) -> dict[str, Any]:
        content = _sound(place, block)
        (folder / _name(block)).write_bytes(content)
        found = hashlib.sha256(content).hexdigest()
        return {"file": _name(block), "first": block[0], "last": block[1] - 1, "sha256": found}

    with ThreadPoolExecutor(READERS) as pool:
        entries = list(pool.map(copy, order.blocks))
    write_json(
        folder / "manifest.json",
        {
            "n": order.n,
            **about,
            "shape": sampler.shape,
            "seed": sampler.seed,
            "weights": sampler.weights,
            "weights_sha256": sampler.weights_sha256,
            "step": sampler.step,
            "sampler": sampler.settings,
            "nfe": nfe(order, runtime),
            "shards": entries,
            "sha256": hashlib.sha256("".join(str(entry["sha256"]) for entry in entries).encode()).hexdigest(),
        },
    )


def animate(drawer: Drawer, n: int) -> list[Tensor]:
    """The first n images at the end of noise levels, and when they are done: uint8, (n, C, H, W) each.

    Of more than MOST_LEVELS levels every second, third and so on counts, such that the last one does.
    """
    frames: list[Tensor] = []
    s = drawer.sampler
    last, every = s.steps - 1, -(-s.schedule["L"] // MOST_LEVELS) * s.steps_per_level

    def observe(x: Tensor, step: int, sigma: float) -> None:
        if (last - step) % every == 0:
            frames.append(images.to_uint8(x))

    final = images.to_uint8(drawer.pixels(torch.arange(n), observe=observe))
    return [frame.cpu() for frame in [*frames, final]]


def _alike(orders: Mapping[str, Order]) -> dict[str, str]:
    """Of each order the first one with the same network in the same precision."""
    first: dict[tuple[str, str], str] = {}
    return {
        name: first.setdefault((order.sampler.weights_sha256, order.sampler.precision), name)
        for name, order in orders.items()
    }


def _notes(order: Order, storage: Store) -> list[dict[str, Any]]:
    place = storage / order.sampler.name
    return [json.loads(place.read(_note(block))) for block in order.blocks]


def _sound(place: Store, block: Block) -> bytes:
    content = _read(place, block)
    if content is None:
        raise StageError(f"{place.uri}/{_name(block)} is damaged or gone: the same command draws it again")
    return content


def _read(place: Store, block: Block) -> bytes | None:
    """The content of a shard; None if it is not what was written, which is reported."""
    try:
        content, note = place.read(_name(block)), place.read(_note(block))
    except FileNotFoundError:
        return None
    try:
        told = json.loads(note)["sha256"]
    except (ValueError, KeyError, TypeError):
        told = None
    if hashlib.sha256(content).hexdigest() == told:
        return content
    log.warning("%s/%s is damaged and drawn again", place.uri, _name(block))
    return None


def _name(block: Block) -> str:
    return f"shard_{block[0]:06d}_{block[1]:06d}.npy"


def _note(block: Block) -> str:
    return f"shard_{block[0]:06d}_{block[1]:06d}.json"
