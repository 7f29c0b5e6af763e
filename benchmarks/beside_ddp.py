"""Ray Train, as the stage train uses it, beside torch's own DistributedDataParallel, on the same steps.

Ours is `pipeline.train.fit` with all it does: a progress bar, losses for each level, the check of each step, stops on
request. The other is what one would write with torch alone: processes that torch.multiprocessing starts, DDP around
the network, batches by `train_step.Step`. The clock runs when all workers have made their first steps.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, multiprocessing, nn

from benchmarks.train_step import IMAGES, Problem, Step, Switches, log, seconds, steps_of
from ncsn.noise import geometric_sigmas
from pipeline import _params, _ray, train
from pipeline._stage import StopSignals
from pipeline._store import store
from pipeline.compose import compose

WINDOWS = 3  # of so many steps, that each run is timed for after one of warm-up


def measure(problem: Problem, device: str, *, workers: int, steps: int, repeats: int) -> dict[str, Any]:
    """Images/s of both, in turns, and the ratio.

    Args:
        problem: What is trained; its batch is that of all workers together.
        device: "cpu" (gloo) or "cuda" (NCCL).
        workers: Processes; on "cuda" each has a GPU.
        steps: Timed in a row.
        repeats: Turns.
    """
    if problem.batch % workers:
        raise SystemExit(f"error: --batch {problem.batch}: expected a multiple of --workers {workers}")
    precision = "bf16" if device == "cuda" else "fp32"
    rates: dict[str, list[float]] = {"ray": [], "ddp": []}
    with tempfile.TemporaryDirectory() as folder:
        params = _parameters(problem, precision, workers, steps, folder)
        with _ray.cluster(params.runtime):
            for turn in range(repeats):
                log(f"turn {turn + 1} of {repeats}")
                here = Path(folder, str(turn))
                here.mkdir()
                rates["ddp"].append(_ddp(problem, precision, device, workers, steps, here))
                rates["ray"].append(_ray_train(problem, params, here))
    ratios = [mine / other for mine, other in zip(rates["ray"], rates["ddp"], strict=True)]
    return {
        "workers": workers,
        "precision": precision,
        "images_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ray_to_ddp": statistics.median(ratios),
        "ray_to_ddp_range": [min(ratios), max(ratios)],
    }


def _parameters(problem: Problem, precision: str, workers: int, steps: int, folder: str) -> _params.Params:
    params = _params.parse(compose([]))
    last = (1 + WINDOWS) * steps
    return dataclasses.replace(
        params,
        data=dataclasses.replace(params.data, flip=True),
        model=_params.Model(problem.model, problem.width, "elu", None, None, None, None),
        train=dataclasses.replace(
            params.train,
            steps=last,
            batch_size=problem.batch,
            learning_rate=1e-4,
            precision=precision,
            log_every=steps,
            save_every=last,
            preview_every=last,
        ),
        runtime=dataclasses.replace(params.runtime, workers=workers, storage=folder, compile=False),
    )


def _ray_train(problem: Problem, params: _params.Params, folder: Path) -> float:
    """Images/s that the workers tell."""
    sigmas = geometric_sigmas(50, 0.01, 10).tolist()
    levels = {"sigmas": sigmas, "L": len(sigmas), "epsilon": 1e-5, "steps_per_level": 1}
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, *problem.shape), dtype=np.uint8)
    np.save(folder / "train.npy", pixels)
    place = store(str(folder / "run"))
    train.claim(place, {})
    data = _ray.share(folder / "train.npy", "benchmark", params.runtime)
    job = train.Job(params, data, pixels[: problem.batch], problem.shape, levels, place)
    rates: list[float] = []

    def hear(kind: str, *what: Any) -> None:
        if kind == "metrics":
            rates.append(what[0]["train/images_per_second"])

    with StopSignals() as signals:
        _ray.train(train.fit, job, params.runtime, name=f"benchmark-{time.time_ns()}", signals=signals, hear=hear)
    assert len(rates) == 1 + WINDOWS
    return statistics.median(rates[1:])


def _ddp(problem: Problem, precision: str, device: str, workers: int, steps: int, folder: Path) -> float:
    """Images/s of the first worker, times all of them."""
    threads = max(1, torch.get_num_threads() // workers)
    arguments = dataclasses.asdict(problem), precision, device, workers, steps, threads, str(folder)
    multiprocessing.spawn(_worker, arguments, nprocs=workers)
    return statistics.median(json.loads((folder / "rates.json").read_text()))


def _worker(
    rank: int, problem: dict[str, Any], precision: str, device: str, workers: int, steps: int, threads: int, folder: str
) -> None:
    torch.set_num_threads(threads)
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(where)
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, f"file://{folder}/meeting", rank=rank, world_size=workers)
    mine = Problem(**problem | {"batch": problem["batch"] // workers})
    step: Step
    (step,) = steps_of(mine, [Switches(precision, channels_last=True)], where).values()
    step.forward = nn.parallel.DistributedDataParallel(step.state.model, [where] if device == "cuda" else None)
    seconds(step, where, steps)
    rates = [problem["batch"] / seconds(step, where, steps) for _ in range(WINDOWS)]
    if rank == 0:
        Path(folder, "rates.json").write_text(json.dumps(rates))
    distributed.destroy_process_group()
