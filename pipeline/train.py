"""Train the score network by denoising or sliced score matching, on Ray Train.

Reads out/data, out/schedule and the sections `loss`, `model` and `train`; writes out/train: the averaged weights, the
initial ones, the loss curves and previews. Checkpoints lie in runs/, under a name that hashes parameters, data and
code: the same command goes on from the newest one, on a CPU to the same bits as a run that was never broken.
"""

import csv
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ncsn import images, random, samplers
from ncsn.losses import annealed_sliced_score_matching, denoising_score_matching
from ncsn.networks import NCSN, NETWORKS, ScoreNetwork
from ncsn.training import Objective, TrainState, data_order, train_draws, train_step
from pipeline import _params, _ray, _stage, _track, prepare, schedule
from pipeline._pictures import grid_picture, save_png
from pipeline._stage import StageError, log
from pipeline._store import code_digest, fingerprint, read_json, replacing_folder, sha256, write_json

OUT = Path("out/train")
RUNS = Path("runs")
KEEP = 2  # checkpoints: the newest, and one more in case the newest is damaged
PREVIEW = 25  # images
FEWEST = 4  # where a preview would cost more than PREVIEW_BUDGET
PREVIEW_BUDGET = 32 * 10**6  # pixels through the network; NCSNv2 on CIFAR-10 needs 30 million for 25 images


@dataclass(frozen=True)
class Job:
    """What a worker needs to train; a plain value."""

    params: _params.Params
    data: Path
    shape: tuple[int, ...]
    schedule: dict[str, Any]
    folder: Path
    run: _track.Run

    @property
    def network(self) -> dict[str, Any]:
        """What model.json says of the network."""
        return describe(self.params.model, self.shape[0], self.schedule["sigmas"])


def main(params: _params.Params) -> None:
    manifest, levels = prepare.manifest(), schedule.load()
    check(describe(params.model, manifest["shape"][0], levels["sigmas"]), manifest["shape"])
    identity = {
        "params": _params.as_dict(params, "loss", "model", "train"),
        "flip": params.data.flip,
        "data": manifest["splits"]["train"]["sha256"],
        "levels": {key: levels[key] for key in ("sigmas", "epsilon", "steps_per_level")},  # the last two: previews
        "code": code_digest(
            "ncsn/images.py",
            "ncsn/losses.py",
            "ncsn/networks",
            "ncsn/noise.py",
            "ncsn/random.py",
            "ncsn/samplers.py",
            "ncsn/training.py",
            "pipeline/train.py",
        ),
    }
    folder = (RUNS / f"train-{fingerprint(identity)}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    log.info("run folder %s", folder)
    with _track.run(params) as run:
        job = Job(params, prepare.OUT.resolve() / "train.npy", tuple(manifest["shape"]), levels, folder, run)
        try:
            with _ray.cluster(params.runtime):
                _ray.train(fit, job, workers=_ray.most(params.runtime.workers), storage=folder)
        except FloatingPointError as error:
            kept = [path.name for path in checkpoints(folder)]
            raise StageError(f"{error}; last good checkpoint: {kept[0] if kept else 'none'} in {folder}") from error
        publish(job, fingerprint(identity))
        run.artifact(OUT / "loss.csv", "train")
        run.artifact(OUT / "loss_per_level.csv", "train")


def describe(model: _params.Model, channels: int, sigmas: list[float]) -> dict[str, Any]:
    """The name and all arguments of a network for images with so many channels, and for these noise levels."""
    network: dict[str, Any] = {"name": model.name, "channels": channels, "width": model.width, "act": model.act}
    network["rescale"] = True
    if model.multipliers is not None:
        network["multipliers"] = list(model.multipliers)
    if issubclass(NETWORKS[model.name], NCSN):
        network["sigmas"] = sigmas
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
        with torch.device("meta"):
            multiple = build(network).multiple
    except ValueError as error:
        raise StageError(f"model.name={network['name']}: {error}") from error
    if any(side % multiple for side in shape[1:]):
        raise StageError(
            f"data.resolution: the images are {shape[1]}x{shape[2]}, but model.name={network['name']} takes sides that "
            f"are multiples of {multiple} alone; set data.resolution to one (data=image_folder) or take another model"
        )


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
    data = np.load(job.data, mmap_mode="r")
    sigmas = torch.tensor(job.schedule["sigmas"], dtype=torch.float64)
    state, curves = start(job, world)
    forward = world.wrap(state.model)
    window = torch.zeros(len(sigmas), 2, dtype=torch.float64)  # since the last row of the curves: losses, count
    bar = world.progress(p.steps, initial=state.step, unit="step") if world.rank == 0 else None
    while state.step < p.steps:
        x, level, *draws = batch(job, data, sigmas, state.step, world)
        sigma = sigmas[level].float()
        state.learning_rate = learning_rate(p, state.step)
        here = (tensor.to(world.device) for tensor in (x, sigma, *draws))
        threads = min(world.threads, len(level))
        loss = train_step(state, *here, objective=objective(job.params.loss), forward=forward, threads=threads)
        window.index_add_(0, level, torch.stack([loss.double().cpu(), torch.ones(len(level))], 1).double())
        if due(state.step, p.log_every, p.steps):
            curves = torch.cat([curves, row(state.step, world.sum(window))])
            window.zero_()
        if bar is not None:
            observe(job, state, curves, bar)


def learning_rate(p: _params.Train, step: int) -> float:
    """The learning rate of a step, counted from 0: a linear warm-up, then constant, or falling linearly towards 0."""
    return p.learning_rate * min(1, (step + 1) / max(1, p.warmup)) * (1 - step / p.steps if p.decay == "linear" else 1)


def due(step: int, every: int, last: int) -> bool:
    """Whether something done every so many steps, and after the last one, is to be done now."""
    return step % every == 0 or step == last


def batch(job: Job, data: np.ndarray, sigmas: Tensor, step: int, world: _ray.World) -> tuple[Tensor, ...]:
    """This worker's share of a global batch: images (B, C, H, W) in [0, 1], levels (B,), noise shaped like the images;
    for sliced score matching also n directions an image, (B, n, C, H, W).

    Everything is a function of the seed and of the samples' global numbers.
    """
    p = job.params.train
    share = p.batch_size // world.size
    first = step * p.batch_size + world.rank * share
    index = torch.arange(first, first + share)
    x = images.to_float(torch.from_numpy(data[data_order(len(data), seed=p.seed, first=first, count=share).numpy()]))
    if job.params.data.flip:
        x = images.flip(x, random.uniform(p.seed, random.TRAIN_FLIP, index, 0, (1,))[:, 0])
    if p.dequantise:
        x = images.dequantise(x, random.uniform(p.seed, random.TRAIN_DEQUANTISE, index, 0, x.shape[1:]))
    draws: tuple[Tensor, ...] = train_draws(sigmas, x.shape[1:], seed=p.seed, index=index, level_power=p.level_power)
    if job.params.loss.name != "dsm":
        shape = (job.params.loss.projections, *x.shape[1:])
        draws = *draws, random.signs(p.seed, random.TRAIN_DIRECTION, index, 0, shape)
    return x, *draws


def row(step: int, window: Tensor) -> Tensor:
    """One row of the curves, shape (1, 2 + L): step, mean loss, mean loss of each level (NaN where there was none)."""
    total = window.sum(0)
    return torch.cat([torch.tensor([step, total[0] / total[1]]), window[:, 0] / window[:, 1]])[None]


def observe(job: Job, state: TrainState, curves: Tensor, bar: Any) -> None:
    """What worker 0 does beside training: log, draw, save; in this order, so that what is saved has its previews."""
    p = job.params.train
    if due(state.step, p.log_every, p.steps):
        bar.update(state.step - bar.n)
        job.run.metrics({"train/loss": float(curves[-1, 1])}, state.step)
    if due(state.step, p.preview_every, p.steps):
        preview(job, state)
    if due(state.step, p.save_every, p.steps):
        save(job.folder, state, curves)


def start(job: Job, world: _ray.World) -> tuple[TrainState, Tensor]:
    """The newest sound checkpoint, or the initial state."""
    p = job.params
    model = initial_network(job.network, p.train.seed).to(world.device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=p.train.learning_rate, betas=(0.9, p.train.beta_2), eps=p.train.adam_eps, fused=True
    )
    state = TrainState(model, optimizer, ema_decay=p.train.ema_decay, ema_warmup=p.train.ema_warmup)
    curves = torch.empty(0, 2 + job.schedule["L"], dtype=torch.float64)
    for folder in checkpoints(job.folder):
        file = folder / "state.safetensors"
        if not file.is_file() or sha256(file) != read_json(folder / "meta.json")["sha256"]:
            log.warning("checkpoint %s is damaged and skipped", folder)
            continue
        tensors = load_file(file)
        curves = tensors.pop("curves")
        state.load_state_dict(tensors)
        log.info("going on from %s", folder)
        return state, curves
    if world.rank == 0:
        save(job.folder, state, curves)
    return state, curves


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first."""
    return sorted(folder.glob("step_*"), reverse=True)


def save(folder: Path, state: TrainState, curves: Tensor) -> None:
    """Write a checkpoint folder atomically and delete old ones, but for the initial one and the newest `KEEP`.

    Raises:
        FloatingPointError: If a weight is not finite; nothing is written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in state.state_dict().items()}
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise FloatingPointError(f"{bad[0]} is not finite at step {state.step}: lower the learning rate")
    with replacing_folder(folder / f"step_{state.step:08d}") as part:
        save_file(tensors | {"curves": curves}, part / "state.safetensors")
        write_json(part / "meta.json", {"step": state.step, "sha256": sha256(part / "state.safetensors")})
    for old in checkpoints(folder)[KEEP:-1]:
        shutil.rmtree(old)


def preview(job: Job, state: TrainState) -> None:
    """Draw `preview_size` images with the averaged weights, always from the same noise, as a file and in MLflow."""
    index = torch.arange(preview_size(job), device=next(state.model.parameters()).device)
    seed = job.params.train.seed
    x = samplers.annealed_langevin(
        state.ema.model,
        random.start_images(seed, index, job.shape),
        torch.tensor(job.schedule["sigmas"]),
        epsilon=job.schedule["epsilon"],
        steps_per_level=job.schedule["steps_per_level"],
        noise=random.seeded_noise(seed, index),
    )
    picture = grid_picture(images.to_uint8(x.cpu()), columns=5)
    save_png(picture, job.folder / "previews" / f"step_{state.step:08d}.png")
    job.run.image(np.asarray(picture), "train/samples", state.step)


def preview_size(job: Job) -> int:
    """How many images a preview has: as many of `PREVIEW` as `PREVIEW_BUDGET` allows, since the other workers wait, but
    no fewer than `FEWEST`."""
    nfe = job.schedule["L"] * job.schedule["steps_per_level"] + 1
    return max(FEWEST, min(PREVIEW, PREVIEW_BUDGET // (nfe * math.prod(job.shape[1:]))))


def publish(job: Job, name: str) -> None:
    """Write out/train from the last checkpoint of the run folder."""
    last, first = checkpoints(job.folder)[0], checkpoints(job.folder)[-1]
    tensors, initial = load_file(last / "state.safetensors"), load_file(first / "state.safetensors")
    p = job.params
    with replacing_folder(OUT) as out:
        write_model(
            out,
            below(tensors, "ema."),
            below(initial, "model."),
            {
                "network": job.network,
                "space": "pixels",
                "step": int(tensors["step"]),
                "ema_decay": p.train.ema_decay,
                "seed": p.train.seed,
                "fingerprint": name,
            },
        )
        write_curves(tensors["curves"], out)
        (job.folder / "previews").mkdir(exist_ok=True)  # a person may have removed them
        shutil.copytree(job.folder / "previews", out / "previews")


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
    _stage.run("train", __doc__, main)
