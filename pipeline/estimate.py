"""Estimate what training, drawing and judging take, in time and memory, before anything is queued.

Times a few real training steps, Langevin steps and features on this machine, each kind in a process of its own, and
multiplies. Reads params.yaml as it is, out/data and out/schedule, which `dvc repro schedule` writes, and out/features
for the judging. Writes nothing. Not counted: the start of Ray, and workers that wait for each other.
"""

import argparse
import dataclasses
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch_fidelity.metric_prc import prc_features_to_metric

from ncsn.training import update
from pipeline import _extractors, _params, _ray, _reference, _stage, evaluate, prepare, sample, schedule, train
from pipeline._sampler import Drawer, Model, Sampler, evaluations, of_section
from pipeline._stage import StageError, log
from pipeline._store import store

MANY = 50_000  # images of a published FID
OF_RK45 = 150  # evaluations that are assumed where a sampler chooses their number: about what it takes
WARM_UP = 3  # training steps
LEAST_STEPS, LEAST_SECONDS = 5, 5.0  # of training that are timed
LEVELS = 2  # Langevin steps that are timed
SIDE_BY_SIDE = 4  # processes at most that draw at the same time while that is timed
ROWS = 1000  # of features that the metrics are timed on: as many as a subset of KID has


@dataclass(frozen=True)
class Training:
    """What was timed of training, in seconds.

    Args:
        step: Of the whole batch.
        save: A checkpoint, with the loss on test images.
        preview: Of both grids.
        checkpoint: Its bytes.
        micro_batch: Images that went through the network at once; fewer than asked for if memory did not suffice.
        peak: Bytes.
    """

    step: float
    save: float
    preview: float
    checkpoint: int
    micro_batch: int
    peak: int


@dataclass(frozen=True)
class Drawing:
    """Seconds of a Langevin step of a whole shard, and bytes, of one of the processes that draw at the same time."""

    step: float
    peak: int


@dataclass(frozen=True)
class Judging:
    """Seconds of one image's features, of all metrics of `ROWS` rows, of one pair of rows in precision; bytes."""

    image: float
    metrics: float
    pair: float
    peak: int


@dataclass(frozen=True)
class Row:
    """A line of the table: seconds for one worker and for all of them, bytes of one process."""

    what: str
    one: float
    all: float
    peak: int


def main(params: _params.Params, *, as_json: bool = False) -> None:
    found = estimate(params)
    print(json.dumps(found, indent=2) if as_json else table(found))


def estimate(params: _params.Params) -> dict[str, Any]:
    """The table, and what it was computed from.

    Raises:
        StageError: If a stage has to run first, or the memory does not suffice.
    """
    splits, levels, p = prepare.manifest()["splits"], schedule.load(), params.train
    workers, slots = _ray.most(params.runtime.workers), _slots()
    known = evaluations(params.sample.method, of_section(params.sample, levels), params.sample.denoise)
    nfe, about = known or OF_RK45, "" if known else "about "
    yardstick = min(params.sample.n, splits["test"]["n"], sample.YARDSTICK)

    log.info("timing training")
    (training,) = _apart(time_training, params)
    log.info("timing Langevin steps")
    drawings = _apart(time_drawing, params, times=min(slots, SIDE_BY_SIDE))
    drawing = max(drawings, key=lambda each: each.step)
    judging: Judging | None = None
    reason: str | None = None
    try:
        if _extractors.choose(params.evaluate) is None:
            reason = "the data has no labels and there are no Inception weights: nothing would be measured"
        else:
            log.info("timing features and metrics")
            (judging,) = _apart(time_judging, params)
    except StageError as error:
        reason = str(error)

    steps = p.steps * training.step
    beside = (1 + p.steps // p.save_every) * training.save + p.steps // p.preview_every * training.preview
    rows = [Row(f"train: {p.steps:,} steps of {p.batch_size}", steps + beside, steps / workers + beside, training.peak)]
    drawn: dict[str, list[int]] = {}
    kept = kept_at_the_end(params)
    if params.select.rule == "fid":
        drawn[f"select: {kept} times {params.select.n:,} images"] = [params.select.n] * kept
    for n in (params.sample.n, MANY):
        drawn[f"sample: {n:,} images, NFE {about}{nfe:,}"] = [n, yardstick]
    for name, images in drawn.items():
        shards = sum(-(-n // params.sample.shard_size) for n in images)
        one, all_of_them = (-(-shards // (slots * count)) * nfe * drawing.step for count in (1, workers))
        rows.append(Row(name, one, all_of_them, drawing.peak))
    if judging is not None:
        for n in (params.sample.n, MANY):
            seconds = judged(judging, n, splits["train"]["n"], yardstick)
            rows.append(Row(f"evaluate: {n:,} images", seconds, seconds, judging.peak))
    return {
        "machine": _machine(),
        "workers": workers,
        "rows": [dataclasses.asdict(row) for row in rows],
        "checkpoint": {
            "bytes": training.checkpoint,
            "kept": kept + 1,  # and one that is being written
            "storage": params.runtime.storage,
        },
        "images_per_second": p.batch_size / training.step,
        "micro_batch": training.micro_batch,
        "not_evaluated": reason,
        "timed": {
            "training": dataclasses.asdict(training),
            "drawing": dataclasses.asdict(drawing) | {"at_the_same_time": len(drawings), "slots": slots},
            "judging": dataclasses.asdict(judging) if judging is not None else None,
        },
    }


def table(found: dict[str, Any]) -> str:
    """The estimate for people."""
    workers, gib = found["workers"], 2**30
    several = f"{workers} workers" if workers > 1 else ""
    lines = [f"{'on ' + found['machine']:44}{'1 worker':>12}{several:>14}{'peak memory':>14}"]
    for row in found["rows"]:
        shown = duration(row["all"]) if workers > 1 else ""
        lines.append(f"{row['what']:44}{duration(row['one']):>12}{shown:>14}{row['peak'] / gib:>10.1f} GiB")
    if found["not_evaluated"]:
        lines.append(f"evaluate: {found['not_evaluated']}")
    kept, size = found["checkpoint"]["kept"], found["checkpoint"]["bytes"]
    lines.append(
        f"{found['images_per_second']:.1f} training images/s; checkpoints of {size / 2**20:.1f} MiB, up to {kept} kept "
        f"({kept * size / 2**20:.1f} MiB) in {found['checkpoint']['storage']}"
    )
    lines.append(
        "Sampling includes the images of the untrained network. Memory is that of one process"
        + (", time that of workers that are all like this machine and never wait." if workers > 1 else ".")
    )
    return "\n".join(lines)


def kept_at_the_end(params: _params.Params) -> int:
    """How many checkpoints a training leaves at most, which `select` chooses from: the newest, milestones, the best."""
    p = params.train
    saved = [*range(p.save_every, p.steps, p.save_every), p.steps]
    milestones = [step for step in saved if p.keep_every and step % p.keep_every == 0]
    return min(len(saved), len({*saved[-params.runtime.keep :], *milestones}) + 1)


def duration(seconds: float) -> str:
    """In the unit that suits."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def judged(judging: Judging, n: int, reference: int, yardstick: int) -> float:
    """Seconds of the stage evaluate: features of all images, then the metrics of five sets.

    The metrics of n images and M neighbours take what they take for `ROWS` of both, and more for precision and recall,
    which look at all pairs within and between the two sets.
    """
    M = min(reference, _reference.NEIGHBOURHOOD_IMAGES)

    def metrics(rows: int) -> float:
        return judging.metrics + judging.pair * ((rows + M) ** 2 - (2 * ROWS) ** 2)

    return judging.image * (reference + n + 3 * yardstick) + max(0.0, metrics(n)) + 4 * max(0.0, metrics(yardstick))


def time_training(params: _params.Params) -> Training:
    """Time what `train.fit` does, on one worker."""
    world = _world(params)
    manifest = prepare.manifest()
    with tempfile.TemporaryDirectory() as folder:
        place = store(folder)
        place.write("identity.json", b"{}")
        held_out = np.array(prepare.load("test")[0][: train.HELD_OUT])
        data = _ray.Shared(path=(prepare.OUT / "train.npy").resolve())
        job = train.Job(params, data, held_out, tuple(manifest["shape"]), schedule.load(), place)
        train.check(job.network, manifest["shape"])
        train.use_precision(params.train.precision)
        state, curves, window = train.start(job, world)
        batches, gradients, watch = (
            train.Batches(job, world),
            train.Gradients(job, state, world),
            train.Watch(job, world),
        )

        def step() -> None:
            x, level, sigma, *draws = batches(state.step)
            loss, _ = gradients(x, sigma, *draws)
            norm = update(state, loss)
            watch(state.step, level, loss, norm)

        for _ in range(WARM_UP):
            step()
        state.learning_rate = 0.0  # what is timed is not to diverge
        seconds = [_seconds(step) for _ in range(LEAST_STEPS)]
        while sum(seconds) < LEAST_SECONDS:
            seconds.append(_seconds(step))
        save = _seconds(lambda: train.save(job, state, curves, window))
        checkpoint = max(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))  # the first lacks moments
        images = torch.arange(train.preview_size(job))
        drawer = _drawer(job)
        drawer.draw(images)
        nfe = job.schedule["L"] * job.schedule["steps_per_level"] + 1
        preview = 2 * nfe * _seconds(lambda: drawer.draw(images)) / LEVELS
    return Training(statistics.fmean(seconds), save, preview, checkpoint, gradients.most, _peak())


def time_drawing(params: _params.Params) -> Drawing:
    """Time Langevin steps of a shard, as a worker of the stage sample takes them: on a CPU by one thread."""
    torch.set_num_threads(1)
    manifest = prepare.manifest()
    with tempfile.TemporaryDirectory() as folder:
        nothing = _ray.Shared(), np.empty(0, np.uint8)
        job = train.Job(params, *nothing, tuple(manifest["shape"]), schedule.load(), store(folder))
        train.check(job.network, manifest["shape"])
        drawer = _drawer(job)
        shard = torch.arange(params.sample.shard_size)
        drawer.draw(shard)
        return Drawing(_seconds(lambda: drawer.draw(shard)) / LEVELS, _peak())


def time_judging(params: _params.Params) -> Judging:
    """Time features of training images, and the metrics on as many rows of random features."""
    extractor = _extractors.choose(params.evaluate)
    assert extractor is not None
    images = prepare.load("train")[0][: 4 * _extractors.BATCH]
    features = extractor.open()
    layers = features(images)
    image = _seconds(lambda: features(images)) / len(images)
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(ROWS, layer.shape[1], generator=generator) for name, layer in layers.items()}
    reference = _reference.Reference.of(rows[extractor.layer("fid")].flip(0), 0)

    def judge() -> None:
        evaluate.distances(rows, extractor, reference, 0)

    judge()
    metrics = _seconds(judge)

    def neighbours() -> None:
        prc_features_to_metric(
            rows[extractor.layer("fid")],
            reference.neighbours,
            prc_batch_size=1000,
            save_cpu_ram=True,
            verbose=False,
            prc_neighborhood=evaluate.NEIGHBOURS,
        )

    return Judging(image, metrics, _seconds(neighbours) / (2 * ROWS) ** 2, _peak())


def _drawer(job: train.Job) -> Drawer:
    """The stage sample's drawer, with the untrained network and `LEVELS` small steps."""
    levels = job.schedule | {"sigmas": job.schedule["sigmas"][-LEVELS:], "L": LEVELS, "steps_per_level": 1}
    p, method = job.params.sample, "annealed_langevin"  # an evaluation costs the same in all
    sampler = Sampler(
        job.network, job.params.train.space, job.shape, "initial", "", 0, method, levels, False, p.precision, p.seed
    )
    weights = save(train.initial_network(job.network, 0).state_dict())
    return Drawer(sampler, Model(job.network, weights, p.precision, job.params.runtime))


def _world(params: _params.Params) -> _ray.World:
    """The only worker of a run on this machine, with as many threads as `_ray.train` gives it."""
    if torch.cuda.is_available():
        return _ray.World(device=torch.device("cuda"))
    cores = torch.get_num_threads()
    threads = 1 if params.runtime.compile else min(cores, _ray.MOST_THREADS)
    torch.set_num_threads(cores // threads)
    return _ray.World(threads=threads)


def _slots() -> int:
    """Processes that draw at the same time on a machine with one GPU, or with none."""
    return 1 if torch.cuda.is_available() else torch.get_num_threads()


def _apart(function: Callable[[_params.Params], Any], params: _params.Params, times: int = 1) -> list[Any]:
    """What a function returns in so many processes of its own at the same time, so that memory is that of it alone."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(times, mp_context=spawn, max_tasks_per_child=1) as pool:
        try:
            return [each.result() for each in [pool.submit(function, params) for _ in range(times)]]
        except BrokenProcessPool as error:
            raise StageError(
                f"{function.__name__} was killed, as happens when memory runs out: set train.micro_batch, lower "
                "sample.shard_size, or take a smaller model"
            ) from error


def _seconds(function: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak() -> int:
    """The most bytes that this process has held, of the GPU or else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU cores"


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON in place of the table")


if __name__ == "__main__":
    from pipeline import estimate as this  # since functions of __main__ would have to be found by other processes

    _stage.run("estimate", __doc__, this.main, _options)
