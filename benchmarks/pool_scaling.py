"""The pool of Ray's workers that draws images, with one worker and with several, in turns.

What is drawn is `pipeline._shards.draw` of a network with random weights into a temporary folder: everything that the
stage `sample` does, but fewer noise levels. On CPUs a worker has one thread; on a GPU the workers share it.
"""

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.train_step import Problem, log
from ncsn.noise import geometric_sigmas
from pipeline import _params, _ray, _shards, train
from pipeline._sampler import Sampler
from pipeline._store import replacing_folder
from pipeline.compose import compose

SHARDS = 4  # that each worker draws in a turn


def measure(problem: Problem, *, workers: int, steps: int, repeats: int) -> dict[str, Any]:
    """Network evaluations/s of all workers together, and how many times as many several do as one.

    "drawing" counts the seconds in which workers draw; "whole" those from the call to its end, Ray's start of the
    processes and the driver's work included.

    Args:
        problem: What is drawn; its batch is a shard.
        workers: Of the larger pool.
        steps: Network evaluations an image.
        repeats: Turns.
    """
    rates: dict[str, dict[int, list[float]]] = {kind: {1: [], workers: []} for kind in ("drawing", "whole")}
    with tempfile.TemporaryDirectory() as folder:
        runtime = dataclasses.replace(_params.parse(compose([])).runtime, storage=folder, compile=False)
        base = _sampler(problem, steps, Path(folder, "model"))
        weights = Path(folder, "model", "ema.safetensors")
        with _ray.cluster(dataclasses.replace(runtime, workers=workers)):
            for turn in range(repeats):
                log(f"turn {turn + 1} of {repeats}")
                for pool in (1, workers):
                    sampler = dataclasses.replace(base, seed=2 * turn + (pool > 1))
                    order = _shards.Order(sampler, weights, SHARDS * pool * problem.batch, problem.batch)
                    share = min(1.0, 1 / pool)
                    drawn = _shards.draw(
                        {"ema": order}, dataclasses.replace(runtime, actors=pool, gpus_per_actor=share)
                    )
                    rates["drawing"][pool].append(pool * order.n * steps / _shards.seconds(order, runtime))
                    rates["whole"][pool].append(drawn.pace * steps)
    ratios = {kind: [b / a for a, b in zip(found[1], found[workers], strict=True)] for kind, found in rates.items()}
    return {
        "workers": workers,
        "evaluations_per_second": {
            kind: {str(pool): statistics.median(values) for pool, values in found.items()}
            for kind, found in rates.items()
        },
        "scaling": {kind: statistics.median(values) for kind, values in ratios.items()},
        "scaling_range": {kind: [min(values), max(values)] for kind, values in ratios.items()},
    }


def _sampler(problem: Problem, steps: int, folder: Path) -> Sampler:
    """With random weights, which it writes."""
    sigmas = geometric_sigmas(1, 0.01, max(2, steps)).tolist()[:steps]
    model = _params.Model(problem.model, problem.width, "elu", None, None, None, None)
    network = train.describe(model, problem.channels, {"sigmas": sigmas})
    weights = train.initial_network(network, 0).state_dict()
    with replacing_folder(folder) as out:
        train.write_model(out, weights, weights, {"network": network})
    levels = {"spacing": "geometric", "sigma_1": 1.0, "sigma_L": 0.01, "L": steps, "steps_per_level": 1}
    return Sampler(
        network=network,
        space="pixels",
        shape=problem.shape,
        weights="ema",
        weights_sha256="0" * 64,
        step=0,
        method="annealed_langevin",
        schedule=levels | {"epsilon": 1e-6, "sigmas": sigmas},
        denoise=False,
        precision="fp32",
        seed=0,
    )
