"""Functions on N Ray workers; the only importer of ray.

`train` runs one function in lockstep on every worker (Ray Train), `shards` maps one over independent pieces of work
(a pool of actors). What they run knows nothing of Ray: it is handed a `World`.
"""

import dataclasses
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError
from ray.experimental import tqdm_ray
from torch import Tensor, nn

from pipeline import _params
from pipeline._stage import log

ROOT = Path(__file__).resolve().parent.parent
MOST_THREADS = 4  # that train side by side: more would wait for Python's lock; other cores help inside operations


@dataclass(frozen=True)
class World:
    """Which worker this is, of how many, and what the workers do together."""

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1  # parts of a batch that this worker computes at the same time

    def wrap(self, model: nn.Module) -> nn.Module | None:
        """The model, such that a backward pass averages the gradients over the workers; None if there is but one."""
        if self.size == 1:
            return None
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[self.device] if self.device.type == "cuda" else None
        )

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the workers, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(value)
        return value

    def progress(self, total: int, *, initial: int, unit: str) -> Any:
        """A progress bar that worker 0 moves and the driver's terminal shows."""
        bar = tqdm_ray.tqdm(total=total, unit=unit)
        bar.update(initial)
        return bar


@contextmanager
def cluster(runtime: _params.Runtime) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS or runtime.ray_address; with neither, start a local one, stopped after."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS") or runtime.ray_address
    if address:
        ray.init(address, logging_level=logging.WARNING, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    else:
        os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves the job beside any other process
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process less to start
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        ray.init(
            "local",
            num_cpus=max(_cores(), most(runtime.workers)),
            include_dashboard=False,
            logging_level=logging.WARNING,
            runtime_env={"worker_process_setup_hook": _quieter()},
            # A folder of our own: traces of other Ray versions and clusters in the default one slow each start down.
            _temp_dir=_local_folder(),
        )
    try:
        yield
    finally:
        ray.shutdown()


def train(fn: Callable[[Any, World], None], job: Any, *, workers: int, storage: Path) -> None:
    """Run fn(job, world) on every worker by Ray Train, one GPU each where the cluster has as many.

    Args:
        fn: A function of an importable module; it keeps its own checkpoints.
        job: Any value that can be pickled.
        workers: How many.
        storage: Folder for Ray Train's own notes.

    Raises:
        Exception: What fn raised, on the first worker that did.
    """
    # Here, since ray.train takes seconds to import and the processes that sample have no use for it.
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"fn": fn, "job": job, "cores": max(1, _cores() // workers)},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=_gpus() >= workers),
        run_config=RunConfig(
            name="ray", storage_path=str(storage.resolve()), failure_config=FailureConfig(max_failures=0)
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        raise next(iter(error.worker_failures.values())) from error


def shards(make: Callable[[], Callable[[Any], Any]], jobs: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield (job, make()(job)) in the order of completion; a worker that dies is replaced and its job repeated.

    There is a worker for each free GPU of the cluster, or without GPUs for each free core: one thread each beats all
    threads on one batch.

    Args:
        make: Called once on each worker; loads what all its jobs need.
        jobs: Independent pieces of work, safe to repeat.
    """
    waiting, running = list(reversed(jobs)), {}
    kind = "GPU" if _gpus() else "CPU"
    slots = max(1, int(ray.available_resources().get(kind, 0)))
    options = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
    worker = ray.remote(max_restarts=3, max_task_retries=3, **options)(_ShardWorker)
    for _ in range(min(slots, len(jobs))):
        actor = worker.remote(make)
        job = waiting.pop()
        running[actor.run.remote(job)] = actor, job
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        actor, job = running.pop(done)
        try:
            result = ray.get(done)
        except RayTaskError as error:
            raise error.cause from error
        yield job, result
        if waiting:
            following = waiting.pop()
            running[actor.run.remote(following)] = actor, following


class _ShardWorker:
    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        torch.set_num_threads(1)
        self.fn = make()

    def run(self, job: Any) -> Any:
        return self.fn(job)


def _train_worker(config: dict[str, Any]) -> None:
    from ray.train import get_context
    from ray.train.torch import get_device

    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    context, device = get_context(), get_device()
    alone = context.get_world_size() == 1 and device.type == "cpu"
    threads = min(config["cores"], MOST_THREADS) if alone else 1
    torch.set_num_threads(config["cores"] // threads)
    config["fn"](config["job"], World(context.get_world_rank(), context.get_world_size(), device, threads))


def _quieter() -> Callable[[], None]:
    """Silences what Ray Train says of guards that a local cluster does not need.

    The placement-group cleaner complains each second of a cluster without a dashboard; the request for more nodes
    prints a traceback where processes start slowly. The function is a local one so that it is sent by value: by name,
    each process of the cluster would import this module, and with it torch.
    """

    def quiet() -> None:
        import logging

        for name in ("controller.placement_group_cleaner", "scaling_policy.autoscaling_coordinator_client"):
            logging.getLogger(f"ray.train.v2._internal.execution.{name}").setLevel("ERROR")

    return quiet


def most(workers: int | tuple[int, ...]) -> int:
    """The largest number of workers that a run may have."""
    return workers if isinstance(workers, int) else workers[-1]


def _gpus() -> float:
    return float(ray.cluster_resources().get("GPU", 0))


def _cores() -> int:
    return torch.get_num_threads()


def _local_folder() -> str:
    """Short, since paths of Unix sockets must stay under 108 bytes; one for each user of the machine."""
    return str(Path(tempfile.gettempdir()) / f"ncsn-ray-{os.getuid()}")
