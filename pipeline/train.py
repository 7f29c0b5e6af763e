"""Train the score network by denoising or sliced score matching, on Ray Train.

Reads out/data, out/schedule and the sections `loss`, `model` and `train`; writes out/train: the averaged weights, the
initial ones, the loss curves and previews. Checkpoints lie in runtime.storage, under a name that hashes parameters,
data and code: the same command goes on from the newest sound one, on a CPU to the same bits as a run that was never
broken. SIGTERM and SIGUSR1 save a checkpoint and end with exit status 75.
"""

import csv
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from ncsn import images, random, samplers
from ncsn.losses import annealed_sliced_score_matching, denoising_score_matching
from ncsn.networks import NCSN, NETWORKS, DDPMpp, ScoreNetwork
from ncsn.optim import Adam
from ncsn.training import Objective, TrainState, accumulate_gradients, data_order, train_positions, update
from pipeline import _checkpoints, _params, _ray, _stage, _track, prepare, schedule
from pipeline._pictures import grid_picture, png_bytes, side_by_side
from pipeline._stage import StageError, log
from pipeline._store import (
    Folder,
    Store,
    code_digest,
    fingerprint,
    read_json,
    replacing_folder,
    sha256,
    store,
    write_json,
)

OUT = Path("out/train")
PREVIEW = 25  # images
FEWEST = 2  # where a preview would cost more than PREVIEW_BUDGET
PREVIEW_BUDGET = 16 * 10**6  # pixels through each of two networks; NCSNv2 on CIFAR-10 needs 16 million for 13 images
HELD_OUT = 500  # test images whose loss tells the best checkpoint
HELD_OUT_BATCH = 100
LEVEL_GROUPS = 10  # curves of the loss in MLflow, each of neighbouring levels
SAID_EVERY = 30  # seconds between lines on the progress, where there is no terminal
DEVICE_SHARE = 0.25  # of a GPU's free memory that the data may take


@dataclass(frozen=True)
class Job:
    """What a worker needs to train, to the last step or until another one; a plain value."""

    params: _params.Params
    data: _ray.Shared
    held_out: NDArray[np.uint8]
    shape: tuple[int, ...]
    schedule: dict[str, Any]
    folder: Store
    until: int | None = None

    @property
    def end(self) -> int:
        """The step at which the workers return."""
        return self.until or self.params.train.steps

    @property
    def network(self) -> dict[str, Any]:
        """What model.json says of the network."""
        return describe(self.params.model, self.shape[0], self.schedule, self.params.train.space)


class DivergedError(FloatingPointError):
    """Too many gradients in a row that are not finite; the weights are still those of the last good step."""

    def __init__(self, step: int, skipped: int, sigma: float | None) -> None:
        self.step, self.skipped, self.sigma = step, skipped, sigma
        where = "in the gradient alone" if sigma is None else f"first of all the loss at noise level sigma={sigma:.4g}"
        super().__init__(
            f"loss or gradient not finite in {skipped} steps in a row (train.max_skipped), up to step {step}, {where}: "
            "lower train.learning_rate"
        )

    def __reduce__(self) -> tuple[type, tuple[int, int, float | None]]:
        return type(self), (self.step, self.skipped, self.sigma)  # travels between processes


def main(params: _params.Params, *, until: int | None = None) -> Store:
    """Train to the end and publish, or `until` a step, at which a checkpoint is saved; the folder of checkpoints."""
    manifest, levels = prepare.manifest(), schedule.load()
    check(describe(params.model, manifest["shape"][0], levels), manifest["shape"])
    identity = {
        "params": _params.result(params, "loss", "model", "train"),
        "flip": params.data.flip,
        "data": manifest["splits"]["train"]["sha256"],
        # epsilon and T: of the previews
        "levels": {key: levels[key] for key in ("sigmas", "sde", "epsilon", "steps_per_level")},
        "code": code_digest(
            "ncsn/images.py",
            "ncsn/losses.py",
            "ncsn/networks",
            "ncsn/noise.py",
            "ncsn/random.py",
            "ncsn/samplers.py",
            "ncsn/sde.py",
            "ncsn/training.py",
            "pipeline/train.py",
        ),
    }
    name = fingerprint(identity)
    runs = store(params.runtime.storage)
    runs.check()
    folder = runs / f"train-{name}"
    claim(folder, identity)
    held_out = np.array(prepare.load("test")[0][:HELD_OUT])
    with _lone(folder), _stage.StopSignals() as signals, _track.run(params) as run, run.system_metrics():
        log.info("run folder %s", folder.uri)
        with _ray.cluster(params.runtime):
            digest = manifest["splits"]["train"]["sha256"]
            data = _ray.share(prepare.OUT / "train.npy", digest, params.runtime)
            job = Job(params, data, held_out, tuple(manifest["shape"]), levels, folder, until)
            try:
                _ray.train(fit, job, params.runtime, name=name, signals=signals, hear=Ear(run, params.train.steps))
            except FloatingPointError as error:
                kept = [f"step {step}" for step in _checkpoints.steps(folder)] or ["none"]
                raise StageError(f"{error}; last good checkpoint: {kept[0]} in {folder.uri}") from error
        if job.end < params.train.steps:
            return folder
        publish(job, name)
        run.trained(weights_sha256())
        run.artifact(OUT / "loss.csv", "train")
        run.artifact(OUT / "loss_per_level.csv", "train")
    return folder


def claim(folder: Store, identity: dict[str, Any]) -> None:
    """Write down what the run folder is for; raises StageError if it is for something else."""
    text = json.dumps(identity, indent=2, sort_keys=True).encode()
    try:
        found = folder.read("identity.json")
    except FileNotFoundError:
        folder.write("identity.json", text)
        return
    if found != text:
        raise StageError(
            f"{folder.uri} holds a run of other parameters, data or code, by its identity.json: move it away, or set "
            "runtime.storage"
        )


@contextmanager
def _lone(folder: Store) -> Iterator[None]:
    """Hold a run folder for this process alone, where it is a local one; raises StageError if another one trains it."""
    if not isinstance(folder, Folder):
        yield
        return
    with open(Path(folder.uri, "lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StageError(f"{folder.uri} is being trained by another process: wait for it, or stop it") from error
        yield


class Ear:
    """Passes on to MLflow what worker 0 tells, and shows how far it is: by a bar on a terminal, else by lines."""

    def __init__(self, run: _track.Run, total: int) -> None:
        self.run, self.total = run, total
        self.bar = tqdm(total=total, unit="step", disable=None, dynamic_ncols=True)
        self.said = time.monotonic()

    def __call__(self, kind: str, *what: Any) -> None:
        if kind == "image":
            self.run.image(*what)
            return
        values, step = what
        if kind == "at":
            self.run.history([(at, {"train/loss": loss}) for at, loss in values], missing=True)
            self.bar.initial = self.bar.last_print_n = step
        else:  # "metrics"
            self.run.metrics(values, step)
            loss = values.get("train/loss", math.nan)  # where all steps were skipped there is none
            self.bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            if self.bar.disable and time.monotonic() - self.said > SAID_EVERY:
                self.said = time.monotonic()
                log.info(
                    "step %d of %d, loss %.4g, %.0f images/s, %s left",
                    *(step, self.total, loss, values["train/images_per_second"]),
                    timedelta(seconds=round(3600 * values["train/hours_left"])),
                )
        self.bar.update(step - self.bar.n)


def describe(model: _params.Model, channels: int, levels: Mapping[str, Any], space: str = "pixels") -> dict[str, Any]:
    """The name and all arguments of a network for images with so many channels, for this schedule and this space of
    `images.SPACES`; of pixels alone it makes 2 x - 1 itself."""
    network: dict[str, Any] = {"name": model.name, "channels": channels, "width": model.width, "act": model.act}
    network["rescale"] = space == "pixels"
    if model.multipliers is not None:
        network["multipliers"] = list(model.multipliers)
    if model.name in _params.SDE_NETWORKS:
        network |= {"blocks": model.blocks, "attention": list(model.attention or ()), "dropout": model.dropout}
    if issubclass(NETWORKS[model.name], DDPMpp):
        sde = levels["sde"]
        network |= {"sde": sde["name"], "beta_min": sde["beta_min"], "beta_max": sde["beta_max"]}
    if issubclass(NETWORKS[model.name], NCSN):
        network["sigmas"] = levels["sigmas"]
    return network


def build(network: dict[str, Any]) -> ScoreNetwork:
    """The score network that model.json describes."""
    return NETWORKS[network["name"]](**{key: value for key, value in network.items() if key != "name"})


def initial_network(network: dict[str, Any], seed: int) -> ScoreNetwork:
    """The network with random weights, which depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(network)


def check(network: dict[str, Any], shape: list[int]) -> None:
    """Raise StageError if the network cannot be built or cannot take images of this shape, (C, H, W)."""
    try:
        with torch.device("meta"), _Blank():
            multiple = build(network).multiple
    except ValueError as error:
        raise StageError(f"model.name={network['name']}: {error}") from error
    if any(side % multiple for side in shape[1:]):
        raise StageError(
            f"data.resolution: the images are {shape[1]}x{shape[2]}, but model.name={network['name']} takes sides that "
            f"are multiples of {multiple} alone; set data.resolution to one (data=image_folder) or take another model"
        )


class _Blank(TorchFunctionMode):
    """Within it no random numbers are drawn: on the meta device torch would import its compiler for them, a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in (Tensor.normal_, Tensor.uniform_) else func(*args, **(kwargs or {}))


def objective(loss: _params.Loss) -> Objective:
    """The loss of each example, from the score and what `batch` returns.

    Sliced score matching projects on Rademacher directions, of the three kinds that arXiv:1905.07088 names (beside
    standard normal ones and unit vectors): E[v v^T] = I makes ssm and ssm_vr estimates of the same objective, and
    v . J v has the least variance, since J's diagonal enters exactly. The official code draws normal ones for ssm_vr,
    and for ssm unit vectors along each row of an image, a slip.
    """
    if loss.name == "dsm":
        return denoising_score_matching

    def sliced(score: Callable[..., Tensor], x: Tensor, sigma: Tensor, z: Tensor, v: Tensor) -> Tensor:
        reduced = loss.name == "ssm_vr"
        return annealed_sliced_score_matching(score, x, sigma, z, v.transpose(0, 1), variance_reduced=reduced)

    return sliced


def fit(job: Job, world: _ray.World) -> None:
    """The training loop, on each worker; how many there are changes the numbers by float summation alone."""
    p = job.params.train
    use_precision(p.precision)
    state, curves, window = start(job, world)
    batches, gradients, watch = Batches(job, world), Gradients(job, state, world), Watch(job, world)
    observer = Observer(job, state, curves, world) if world.rank == 0 else None
    stop = False
    while state.step < job.end and not stop:
        x, level, sigma, *draws = batches(state.step)
        state.learning_rate = learning_rate(p, state.step)
        if job.params.model.dropout:
            torch.manual_seed(dropout_seed(p.seed, state.step, world.rank))
        loss, stop = gradients(x, sigma, *draws)
        norm = update(state, loss, lambda tensors: world.sum(*tensors), clip_norm=p.clip_norm)
        watch(state.step, level, loss, norm)
        window.index_add_(0, level, torch.stack([loss.nan_to_num(0, 0, 0), loss.isfinite()], 1).double())
        if stop or due(state.step, p.log_every, p.steps):
            watch.settle()
            world.sum(window)
            total = window.cpu()
            if due(state.step, p.log_every, p.steps):
                curves = torch.cat([curves, row(state.step, total)])
                total = torch.zeros_like(total)
            window.copy_(total if world.rank == 0 else torch.zeros_like(total))
            if stop and world.rank == 0:
                world.tell(_ray.STOPPING)
            if observer is not None:
                observer(curves, total, norm, watch.skipped, stop)


class Batches:
    """This worker's shares of the global batches: images (B, C, H, W) in the network's space, numbers of levels and
    noise levels (B,), noise shaped like the images; for sliced score matching also n directions an image, (B, n, C, H,
    W). In continuous time a number says between which of the schedule's levels the noise level is.

    Everything is a function of the seed and of the samples' global numbers. The bytes lie on the device if they fit;
    where they do not, a thread reads those of the next batch.
    """

    def __init__(self, job: Job, world: _ray.World) -> None:
        self.job, self.world = job, world
        self.pixels = job.data.open()
        self.to_space, _ = images.SPACES[job.params.train.space]
        self.resident: Tensor | None = None
        self.ahead: tuple[int, Future[Tensor]] | None = None
        if world.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(world.device)
            if self.pixels.nbytes < DEVICE_SHARE * free:
                self.resident = torch.empty(self.pixels.shape, dtype=torch.uint8, device=world.device)
                for first in range(0, len(self.pixels), 10_000):  # no copy of all in this machine's memory
                    some = np.array(self.pixels[first : first + 10_000])
                    self.resident[first : first + len(some)] = torch.from_numpy(some)
            else:
                self.reader = ThreadPoolExecutor(1, "reader")

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        p, device = self.job.params.train, self.world.device
        first, last = share(step, p.batch_size, self.world)
        index = torch.arange(first, last, device=device)
        x = images.to_float(self.rows(step))
        if self.job.params.data.flip:
            x = images.flip(x, random.uniform(p.seed, random.TRAIN_FLIP, index, 0, (1,))[:, 0])
        if p.dequantise:
            x = images.dequantise(x, random.uniform(p.seed, random.TRAIN_DEQUANTISE, index, 0, x.shape[1:]))
        x = self.to_space(x)
        return x, *draws(self.job, index, p.level_power), *directions(self.job, index)

    def rows(self, step: int) -> Tensor:
        """The bytes of the images of this worker's share, on the device."""
        device = self.world.device
        if self.resident is not None:
            return self.resident[self.order(step, device)]
        if device.type == "cpu":
            return self.read(step)
        now = self.ahead[1].result() if self.ahead is not None and self.ahead[0] == step else self.read(step)
        self.ahead = step + 1, self.reader.submit(self.read, step + 1)
        return now.to(device, non_blocking=True)

    def read(self, step: int) -> Tensor:
        rows = torch.from_numpy(self.pixels[self.order(step, torch.device("cpu")).numpy()])
        return rows.pin_memory() if self.world.device.type == "cuda" else rows

    def order(self, step: int, device: torch.device) -> Tensor:
        p = self.job.params.train
        first, last = share(step, p.batch_size, self.world)
        return data_order(len(self.pixels), seed=p.seed, first=first, count=last - first, device=device)


def share(step: int, batch_size: int, world: _ray.World) -> tuple[int, int]:
    """Global numbers of the first sample of a step that is this worker's, and of the first one that is no more."""
    first, last = (step * batch_size + batch_size * rank // world.size for rank in (world.rank, world.rank + 1))
    return first, last


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """Of what is dropped in a step on a worker: so a resumed run drops the same, another number of workers does not."""
    word, *_ = random.words(seed, random.TRAIN_DROPOUT, torch.tensor([rank]), step, 1)
    return int(word)


def draws(job: Job, index: Tensor, level_power: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of levels and noise levels, shape (B,), and noise of the samples with these numbers."""
    seed = job.params.train.seed
    position = train_positions(seed=seed, index=index, power=level_power)
    level, sigma = (position * job.schedule["L"]).long(), schedule.at(job.schedule, position).float()
    return level, sigma, random.normal(seed, random.TRAIN_NOISE, index, 0, job.shape)


def directions(job: Job, index: Tensor) -> tuple[Tensor, ...]:
    """What sliced score matching projects on, for the samples with these numbers; nothing for the other objective."""
    if job.params.loss.name == "dsm":
        return ()
    shape = (job.params.loss.projections, *job.shape)
    return (random.signs(job.params.train.seed, random.TRAIN_DIRECTION, index, 0, shape),)


class Gradients:
    """Computes the gradients of this worker's share; where memory does not suffice, in smaller parts from then on."""

    def __init__(self, job: Job, state: TrainState, world: _ray.World) -> None:
        self.state, self.world, self.p = state, world, job.params.train
        self.objective, self.dropout = objective(job.params.loss), bool(job.params.model.dropout)
        self.forward = torch.compile(state.model, dynamic=False) if job.params.runtime.compile else None
        self.most = self.p.micro_batch or -(-self.p.batch_size // world.size)

    def __call__(self, x: Tensor, sigma: Tensor, *draws: Tensor) -> tuple[Tensor, bool]:
        """Loss of each example, and whether training is to stop after this step, which all workers know together."""
        while True:
            loss = self._try(x, sigma, *draws)
            full, stop = self.world.any(loss is None, self.world.asked_to_stop())
            if loss is not None and not full:
                return loss, stop
            if self.most == 1:
                raise StageError("out of memory with one image at a time: take a smaller model or data.resolution")
            self.most = -(-self.most // 2)
            if self.world.rank == 0:
                log.warning("out of memory: going on with train.micro_batch=%d, the same updates", self.most)

    def _try(self, x: Tensor, sigma: Tensor, *draws: Tensor) -> Tensor | None:
        try:
            with autocast(self.p.precision, x.device):
                return accumulate_gradients(
                    self.state,
                    x,
                    sigma,
                    *draws,
                    objective=self.objective,
                    forward=self.forward,
                    total=self.p.batch_size,
                    micro_batch=self.most,
                    # dropout's numbers come from one generator, in the order of the calls
                    threads=1 if self.dropout else min(self.world.threads, self.most, len(x)),
                )
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        # Here, where the error and what its traceback holds are gone
        self.state.optimizer.zero_grad()
        if x.device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory, or this machine's, did not suffice."""
    told = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in told)


class Watch:
    """Counts skipped steps, a step late so that no device waits for it, and ends a run that skips too many in a row."""

    def __init__(self, job: Job, world: _ray.World) -> None:
        self.most, self.sigmas, self.world = job.params.train.max_skipped, job.schedule["sigmas"], world
        self.skipped = self.in_a_row = 0
        self.pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def __call__(self, step: int, level: Tensor, loss: Tensor, norm: Tensor) -> None:
        """Take note of a step: its number counted from 1, each example's level and loss, the gradient's norm."""
        first_bad = torch.where(loss.isfinite(), len(self.sigmas), level).min()
        told = torch.stack([norm.double(), first_bad.double()]).to("cpu", non_blocking=True)
        event = torch.cuda.Event() if norm.is_cuda else None
        if event is not None:
            event.record()
        self.settle()
        self.pending = step, told, event

    def settle(self) -> None:
        """Look at the last step noted; raises DivergedError, on all workers at once."""
        if self.pending is None:
            return
        (step, told, event), self.pending = self.pending, None
        if event is not None:
            event.synchronize()
        norm, first_bad = told.tolist()
        if math.isfinite(norm):
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        if self.world.rank == 0:
            log.warning("step %d skipped: its loss or gradient is not finite", step)
        if self.in_a_row >= self.most:
            bad = self.world.any(*(level == first_bad for level in range(len(self.sigmas))))
            raise DivergedError(step, self.in_a_row, self.sigmas[bad.index(True)] if any(bad) else None)


class Observer:
    """What worker 0 does beside training: log, draw, save; in this order, so that what is saved has its previews."""

    def __init__(self, job: Job, state: TrainState, curves: Tensor, world: _ray.World) -> None:
        self.job, self.state, self.world = job, state, world
        # what a driver did not live to hear
        told = [(int(step), loss) for step, loss in curves[:, :2].tolist() if math.isfinite(loss)]
        world.tell("at", told, state.step)
        self.saved = time.monotonic()
        self.begun = self.since = self.saved, state.step

    def __call__(self, curves: Tensor, window: Tensor, norm: Tensor, skipped: int, stop: bool) -> None:
        p, step = self.job.params.train, self.state.step
        if due(step, p.log_every, p.steps):
            self.world.tell("metrics", self.metrics(curves, norm, skipped), step)
        if due(step, p.preview_every, p.steps):
            preview(self.job, self.state, self.world)
        long_ago = time.monotonic() - self.saved > self.job.params.runtime.save_interval
        if stop or long_ago or due(step, p.save_every, self.job.end):
            save(self.job, self.state, curves, window, judge=not stop)
            self.saved = time.monotonic()
        if stop:
            log.warning("step %d is saved in %s", step, self.job.folder.uri)
        self.since = time.monotonic(), step

    def metrics(self, curves: Tensor, norm: Tensor, skipped: int) -> dict[str, float]:
        p, step = self.job.params.train, self.state.step
        now = time.monotonic()
        pace, mean_pace = ((now - then) / (step - at) for then, at in (self.since, self.begun))  # seconds a step
        values = {
            "train/loss": float(curves[-1, 1]),
            "train/gradient_norm": float(norm),
            "train/learning_rate": self.state.learning_rate,
            "train/images_per_second": p.batch_size / pace,
            "train/hours_left": (p.steps - step) * mean_pace / 3600,  # previews and checkpoints included
            "train/skipped_steps": skipped,
        }
        if self.world.device.type == "cuda":
            values["train/gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.world.device) / 2**30
        per_level = curves[-1, 2:]
        for group in torch.arange(len(per_level)).tensor_split(min(LEVEL_GROUPS, len(per_level))):
            values[f"train_level/{int(group[0]):04d}"] = float(per_level[group].nanmean())
        return {key: value for key, value in values.items() if math.isfinite(value)}


def use_precision(precision: str) -> None:
    """Set how torch multiplies float32 on GPUs: exactly, or (tf32, bf16) with shorter factors."""
    exact = precision == "fp32"
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact
    torch.backends.cudnn.benchmark = True  # all batches have one shape


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Within it networks compute in bfloat16, if the precision is bf16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def learning_rate(p: _params.Train, step: int) -> float:
    """The learning rate of a step, counted from 0: a linear warm-up, then constant, or falling linearly towards 0."""
    return p.learning_rate * min(1, (step + 1) / max(1, p.warmup)) * (1 - step / p.steps if p.decay == "linear" else 1)


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps, and after the last one, is to be done now."""
    return step % every == 0 or step == last


def row(step: int, window: Tensor) -> Tensor:
    """One row of the curves, shape (1, 2 + L): step, mean loss, mean loss of each level (NaN where there was none)."""
    total = window.sum(0)
    return torch.cat([torch.tensor([step, total[0] / total[1]]), window[:, 0] / window[:, 1]])[None]


def start(job: Job, world: _ray.World) -> tuple[TrainState, Tensor, Tensor]:
    """The newest sound checkpoint, or the initial state: what is trained; the curves; and the losses and their count of
    each level since the curves' last row, shape (L, 2), which worker 0 has of all."""
    p, L = job.params, job.schedule["L"]
    model = initial_network(job.network, p.train.seed).to(world.device).to(memory_format=torch.channels_last)
    optimizer = Adam(
        model.parameters(), lr=p.train.learning_rate, betas=(0.9, p.train.beta_2), eps=p.train.adam_eps, fused=True
    )
    state = TrainState(model, optimizer, ema_decay=p.train.ema_decay, ema_warmup=p.train.ema_warmup)
    curves = torch.empty(0, 2 + L, dtype=torch.float64)
    window = torch.zeros(L, 2, dtype=torch.float64)
    expect_sight(job.folder)
    found = _checkpoints.newest(job.folder)
    if found is not None:
        _, tensors = found
        curves, kept = tensors.pop("curves"), tensors.pop("window")
        window = kept if world.rank == 0 else window
        state.load_state_dict(tensors)
        if world.rank == 0 and state.step:
            log.info("going on from step %d of %s", state.step, job.folder.uri)
    elif world.rank == 0:
        save(job, state, curves, window)
    steps = torch.tensor([state.step, state.step**2], dtype=torch.float64, device=world.device)
    world.sum(steps)
    if world.size * steps[1] != steps[0] ** 2:
        raise RuntimeError(f"the workers do not see the same checkpoints in {job.folder.uri}")  # try again
    return state, curves, window.to(world.device)


def expect_sight(folder: Store) -> None:
    """Raise StageError if this worker does not see the run folder that the driver made."""
    try:
        folder.read("identity.json")
    except FileNotFoundError as error:
        raise StageError(
            f"{folder.uri} is not there on {os.uname().nodename}: runtime.storage must be s3://bucket/prefix, or a "
            "folder that all nodes share"
        ) from error


def save(job: Job, state: TrainState, curves: Tensor, window: Tensor, *, judge: bool = True) -> None:
    """Write a checkpoint, and what the averaged weights lose on test images, unless there is no time to judge it."""
    about = {"step": state.step, "test_loss": held_out_loss(job, state) if judge else None}
    tensors = state.state_dict() | {"curves": curves, "window": window}
    keep, keep_every = job.params.runtime.keep, job.params.train.keep_every
    _checkpoints.write(job.folder, tensors, about, keep=keep, keep_every=keep_every)


def held_out_loss(job: Job, state: TrainState) -> float:
    """Mean loss of the averaged weights on `HELD_OUT` test images, all levels alike, always the same draws."""
    p = job.params
    device = next(state.model.parameters()).device
    to_space, _ = images.SPACES[p.train.space]
    total, most = 0.0, min(HELD_OUT_BATCH, p.train.micro_batch or p.train.batch_size)
    for index in torch.arange(len(job.held_out), device=device).split(most):
        x = to_space(images.to_float(torch.from_numpy(job.held_out[index.cpu().numpy()]).to(device)))
        _, sigma, z = draws(job, index)
        with torch.no_grad(), autocast(p.train.precision, device):
            loss = objective(p.loss)(state.ema.model, x, sigma, z, *directions(job, index))
        total += float(loss.double().sum())
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss on test images is not finite at step {state.step}")
    return total / len(job.held_out)


class _StopError(Exception):
    pass


def preview(job: Job, state: TrainState, world: _ray.World) -> None:
    """Draw `preview_size` images with the averaged weights, and with the last ones beside them, always from the same
    noise, as a file and in MLflow; given up if training is to stop."""

    def give_up(x: Tensor, step: int, sigma: float) -> None:
        if world.asked_to_stop():
            raise _StopError

    index = torch.arange(preview_size(job), device=world.device)
    seed, (to_space, to_pixels) = job.params.train.seed, images.SPACES[job.params.train.space]

    def grid(model: torch.nn.Module) -> Image.Image:
        with autocast(job.params.train.precision, world.device):
            x = samplers.annealed_langevin(
                model,
                to_space(random.start_images(seed, index, job.shape)),
                torch.tensor(job.schedule["sigmas"]),
                epsilon=job.schedule["epsilon"],
                steps_per_level=job.schedule["steps_per_level"],
                noise=random.seeded_noise(seed, index),
                observe=give_up,
            )
        return grid_picture(images.to_uint8(to_pixels(x).cpu()), columns=5)

    try:
        with ThreadPoolExecutor(min(2, world.threads)) as pool:
            grids = list(pool.map(grid, (state.ema.model, state.model)))
    except _StopError:
        return
    picture = side_by_side(grids)
    job.folder.write(f"previews/step_{state.step:08d}.png", png_bytes(picture))
    world.tell("image", np.asarray(picture), "train/samples_averaged_and_last", state.step)


def preview_size(job: Job) -> int:
    """How many images a preview has: as many of `PREVIEW` as `PREVIEW_BUDGET` allows, since the other workers wait, but
    no fewer than `FEWEST`."""
    nfe = job.schedule["L"] * job.schedule["steps_per_level"] + 1
    return max(FEWEST, min(PREVIEW, PREVIEW_BUDGET // (nfe * math.prod(job.shape[1:]))))


def publish(job: Job, name: str) -> None:
    """Write out/train from the last checkpoint of the run folder."""
    steps = _checkpoints.steps(job.folder)
    tensors, p = _checkpoints.read(job.folder, steps[0]), job.params
    with replacing_folder(OUT) as out:
        write_model(
            out,
            below(tensors, "ema."),
            initial_network(job.network, p.train.seed).state_dict(),
            {
                "network": job.network,
                "space": p.train.space,
                "step": int(tensors["step"]),
                "ema_decay": p.train.ema_decay,
                "seed": p.train.seed,
                "fingerprint": name,
            },
        )
        write_curves(tensors["curves"], out)
        (out / "previews").mkdir()
        for picture in job.folder.names():
            if picture.startswith("previews/"):
                job.folder.fetch(picture, out / picture)


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def write_model(folder: Path, ema: dict[str, Tensor], initial: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write what the later stages need of a model: averaged and initial weights, and model.json."""
    for kind, weights in (("ema", ema), ("initial", initial)):
        save_file(weights, folder / f"{kind}.safetensors")
    hashes = {kind: sha256(folder / f"{kind}.safetensors") for kind in ("ema", "initial")}
    parameters = sum(value.numel() for value in initial.values())
    write_json(folder / "model.json", about | {"parameters": parameters, "sha256": hashes})


def weights_sha256() -> str:
    """Of the averaged weights in out/train."""
    return str(read_json(OUT / "model.json")["sha256"]["ema"])


def write_curves(curves: Tensor, folder: Path) -> None:
    """Write loss.csv (step, loss) and loss_per_level.csv (step, level_0, ...; empty where there was no sample)."""
    for name, columns, values in (
        ("loss", ["loss"], curves[:, [0, 1]]),
        (
            "loss_per_level",
            [f"level_{i}" for i in range(curves.shape[1] - 2)],
            curves[:, [0, *range(2, curves.shape[1])]],
        ),
    ):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["step", *columns])
            for step, *losses in values.tolist():
                writer.writerow([int(step), *("" if math.isnan(loss) else f"{loss:.6g}" for loss in losses)])


if __name__ == "__main__":
    from pipeline import train  # since what is defined in __main__ would travel to the workers by value

    _stage.run("train", __doc__, train.main)
