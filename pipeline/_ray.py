"""Functions on N Ray workers; the only importer of ray.

`train` runs one function in lockstep on every worker (Ray Train), `meet` does so for what it returns, `shards` maps one
over independent pieces of work (a pool of actors). What they run knows nothing of Ray: it is handed a `World`.
"""

import dataclasses
import fcntl
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from pipeline import _params
from pipeline._mailbox import Mailbox
from pipeline._stage import StageError, StopSignals, log
from pipeline._store import Bucket, Folder, store

ROOT = Path(__file__).resolve().parent.parent
LISTEN_INTERVAL = 0.5  # seconds between looks into the mailbox
HERE = "NCSN_CLUSTER_IS_LOCAL"
OBJECT_LIMIT = 2**30  # bytes from which on data does not go through Ray's object store
LONGEST = timedelta(days=1)  # that workers wait for each other; for one that died they do not wait
ANSWER = 25.0  # seconds within which the workers should say that they stop
MEETING = timedelta(minutes=3)  # that workers wait for each other only to meet
BUCKET = 64 * 2**20  # bytes that travel between workers at once
BEGUN, SAID, STOPPING = "begun", "said", "stopping"  # messages of our own
MOST_THREADS = 4  # that train side by side: more would wait for Python's lock; other cores help inside operations


@dataclass(frozen=True)
class World:
    """Which worker this is, of how many, and what the workers do together and tell the driver."""

    rank: int = 0
    size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1  # parts of a batch that this worker computes at the same time
    tell: Callable[..., None] = lambda kind, *what: None  # carries a message to the driver
    asked_to_stop: Callable[[], bool] = lambda: False
    host: Any = None  # a process group of the CPUs, where the other one is of the GPUs

    def sum(self, *values: Tensor) -> None:
        """Sum tensors over the workers, in place; many small ones travel together."""
        if self.size == 1:
            return
        for some in _buckets(values):
            flat = torch.cat([value.flatten() for value in some])
            torch.distributed.all_reduce(flat)
            for value, part in zip(some, flat.split([value.numel() for value in some]), strict=True):
                value.copy_(part.view_as(value))

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag, whether it is true on some worker; the answer is the same on all. Waits for no device."""
        if self.size == 1:
            return flags
        told = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group=self.host)
        return tuple(bool(flag) for flag in told)


@contextmanager
def cluster(runtime: _params.Runtime, *, quiet: bool = False) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS or runtime.ray_address; with neither, start a local one, stopped after.
    Within a cluster it is that one.

    To a cluster travels the code, to its workers also what the driver knows of S3 (the AWS variables). What workers
    print is printed here, too, unless `quiet`.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    started: set[psutil.Process] = set()
    try:
        with _signals_kept():
            if address := given_address(runtime):
                _join(address, quiet=quiet)
            else:
                started = _start(runtime, quiet=quiet)
        yield
    finally:
        with _ended_at_once(started):
            ray.shutdown()


def _join(address: str, *, quiet: bool) -> None:
    """Connect to the cluster there."""
    code = {"py_modules": [str(ROOT / package) for package in ("ncsn", "pipeline")]}
    try:
        ray.init(
            address,
            logging_level=logging.WARNING,
            log_to_driver=not quiet,
            runtime_env=None if _here() else code,
        )
    except (ConnectionError, ValueError) as error:
        told = " ".join(str(error).split())
        raise StageError(f"no Ray cluster at RAY_ADDRESS or runtime.ray_address={address}: {told}") from error


def _start(runtime: _params.Runtime, *, quiet: bool) -> set[psutil.Process]:
    """Start a local cluster; the processes it began with."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves the job beside any other process
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process less to start
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    others = set(psutil.Process().children())
    try:
        ray.init(
            "local",
            num_cpus=max(_cores(), most(runtime.workers)),
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=not quiet,
            # Of our own: traces of other Ray versions and clusters in the default folder slow each start down.
            _temp_dir=_local_folder(),
        )
    except Exception as error:  # Ray has no type for it, and its half a minute cannot be set
        if "timed out during startup" not in str(error):
            raise
        raise StageError(
            "Ray did not start within 30 s, is the machine overloaded? The same command goes on"
        ) from error
    return set(psutil.Process().children()) - others


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Signals that come while Ray starts, or is imported, wait for the handlers that are there now, in whose place Ray
    puts its own; only a second Ctrl-C does not.

    Nothing may be raised within: Ray forks, and what is raised in what Python does around a fork is lost, with a lock
    of logging's held for ever. A mask alone does not help, as any thread takes a signal for the main one; it is for
    Ray's processes, which inherit it: a signal to the whole process group is the stage's to answer.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignals.NUMBERS)
    ours: dict[int, Any] = {}
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in came:
            raise KeyboardInterrupt
        came.append(number)

    def set_later(number: int, handler: Any) -> None:
        if not callable(ours.get(number)):  # Ray's is better than none: it ends Ray's processes, too
            ours[number] = handler

    set_now = signal.signal
    if threading.current_thread() is threading.main_thread():
        ours = {number: set_now(number, note) for number in (*StopSignals.NUMBERS, signal.SIGINT)}
        signal.signal = set_later  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = set_now
        for number, handler in ours.items():
            set_now(number, handler)
        signal.pthread_sigmask(signal.SIG_BLOCK, came)
        for number in came:
            signal.raise_signal(number)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)  # here they come


@contextmanager
def _ended_at_once(processes: set[psutil.Process]) -> Iterator[None]:
    """Kill processes as soon as SIGTERM has come to them, which they have blocked: `ray.shutdown` would do so after a
    second for each. Those to which it had come before, with a signal to the whole group, are left to it, since the
    driver must part from them first."""
    over, ours = threading.Event(), [process for process in processes if not _terminated(process)]

    def watch() -> None:
        while not over.wait(0.02):
            for process in filter(_terminated, ours):
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    thread = threading.Thread(target=watch, name="ended at once", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _terminated(process: psutil.Process) -> bool:
    """Whether a blocked SIGTERM waits for a process; False if it is gone, or not on Linux."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    return bool(int(status.partition("ShdPnd:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1)


@dataclass(frozen=True)
class Shared:
    """An array, or another value, that a worker on any node can open, arrays mapped into memory; a plain value."""

    path: Path | None = None  # where all workers see this machine's files
    reference: Any = None  # in Ray's object store
    storage: Folder | Bucket | None = None  # else there, as `name`
    name: str = ""

    def open(self) -> Any:
        """The array, read-only, or the value."""
        if self.reference is not None:
            return ray.get(self.reference)
        if self.path is not None:
            return np.load(self.path, mmap_mode="r")
        assert self.storage is not None
        if isinstance(self.storage, Folder):
            return np.load(Path(self.storage.uri) / self.name, mmap_mode="r")
        copy = Path(_local_folder("data"), self.name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with open(copy.with_suffix(".lock"), "w") as lock:  # the workers of a node fetch one copy
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not copy.is_file():
                self.storage.fetch(self.name, copy)
        return np.load(copy, mmap_mode="r")


def share(path: Path, digest: str, runtime: _params.Runtime) -> Shared:
    """Make an .npy file with this hash readable to all workers of the cluster, within `cluster`.

    A local cluster reads the file. On another one it goes through Ray's object store, or, from OBJECT_LIMIT bytes on,
    through runtime.storage, from where each node takes a copy to its disk.
    """
    if _local(runtime):
        return Shared(path=path.resolve())
    if path.stat().st_size < OBJECT_LIMIT:
        return Shared(reference=ray.put(np.load(path)))
    storage, name = store(runtime.storage) / "data", f"{digest}.npy"
    if name not in storage.names():
        log.info("copying %s to %s", path, storage.uri)
        storage.write(name, path)
    return Shared(storage=storage, name=name)


def put(value: Any) -> Shared:
    """Make a value readable to all workers through Ray's object store, within `cluster`."""
    return Shared(reference=ray.put(value))


def train(
    fn: Callable[[Any, World], None],
    job: Any,
    runtime: _params.Runtime,
    *,
    name: str,
    signals: StopSignals,
    hear: Callable[..., None] = lambda kind, *what: None,
) -> None:
    """Run fn(job, world) on every worker by Ray Train, each with runtime.gpus_per_worker of a GPU if there are any.

    When a worker or a node dies, all start anew, up to runtime.max_failures times; with a range of workers on what is
    left, and on more when there is more; a local cluster, which has the same all the time, takes what it can at once.
    Errors that another try would meet again (any but RuntimeError and OSError, of which a dying neighbour causes some)
    end the run at once. Signals make `world.asked_to_stop` true, so that fn may save and return.

    Args:
        fn: A function of an importable module; it keeps its own checkpoints.
        job: Any value that can be pickled.
        runtime: Its workers, gpus_per_worker, max_failures and resize_interval.
        name: Of the run, for Ray Train's own notes.
        signals: Held from when fn begins until it has ended.
        hear: Called in this process with what the workers `tell`.

    Raises:
        Exception: What fn raised, on the first worker that did.
        StoppedError: After a signal, when fn has returned.
        StageError: If there are fewer GPUs than workers, or workers died too often.
    """
    with _signals_kept():
        # Here, since ray.train takes seconds to import and the processes that sample have no use for it.
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
        from ray.train.torch import TorchConfig

        trainer_class = _trainer_class(_local(runtime))
    workers = runtime.workers if isinstance(runtime.workers, int) else tuple(runtime.workers)
    fewest = workers if isinstance(workers, int) else workers[0]
    if 0 < _gpus() < fewest:
        raise StageError(
            f"runtime.workers={runtime.workers}: the cluster has {_gpus():g} GPUs, expected no more workers"
        )
    if _local(runtime):  # it has what it will ever have
        workers = min(most(runtime.workers), int(_gpus()) or most(runtime.workers))
    if not isinstance(workers, int):
        # What a lost node held is asked for once more; after this time the range's lower end has to do.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    with _Post(hear, signals) as post:
        trainer = trainer_class(
            _train_worker,
            train_loop_config={
                "fn": fn,
                "job": job,
                "side_by_side": not runtime.compile,
                "mailbox": post.mailbox,
                "environment": _credentials(),
            },
            torch_config=TorchConfig(timeout_s=int(LONGEST.total_seconds())),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=_gpus() > 0,
                resources_per_worker={"GPU": runtime.gpus_per_worker} if _gpus() else None,
                elastic_resize_monitor_interval_s=runtime.resize_interval,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=_local_folder("train"),
                failure_config=FailureConfig(max_failures=runtime.max_failures),
            ),
        )
        failure: Exception | None = None
        try:
            trainer.fit()
        except WorkerGroupError as error:
            failure = _cause(list(error.worker_failures.values()), runtime.max_failures)
        except TrainingFailedError as error:
            failure = StageError(f"Ray Train gave up: {' '.join(str(error).split())}")
    if ended := post.error or failure:
        raise ended
    signals.stop()


def _trainer_class(local: bool) -> type[Any]:
    """Ray Train's for torch, without processes of two seconds each that are of no use here: one serves data sets of Ray
    Data, of which there are none; where the cluster is `local`, one clears up after a controller that died, which the
    cluster does not outlive, and one asks for nodes, of which there are no more."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    class Fixed(FixedScalingPolicy):  # type: ignore[misc]
        def after_controller_start(self, train_run_context: Any) -> None:
            """Asks nobody."""

        def _maybe_send_resource_request(self) -> None:
            """Neither."""

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            idle = ["DatasetsCallback", *(["PlacementGroupCleanerCallback"] if local else [])]
            return [each for each in super()._create_default_callbacks() if type(each).__name__ not in idle]

        def _initialize_and_run_controller(self, **settings: Any) -> Any:
            if local:
                settings["scaling_policy"] = Fixed(self.scaling_config)
            return super()._initialize_and_run_controller(**settings)

        def _register_sigint_handler(self, controller: Any) -> None:
            """Leave Ctrl-C to Python: Ray's handler would stay when training is over, and then ask a controller that
            is gone, for which it starts a cluster, or end the program as if all were well."""

    return Trainer


def _cause(failures: list[Exception], max_failures: int) -> Exception:
    """What to raise for the last failures of the workers, of whom those that died draw others after them."""
    failures = [getattr(error, "health_check_failure", error) for error in failures]
    dead = [error for error in failures if isinstance(error, RayActorError)]
    error = (dead or failures)[0]
    if isinstance(error, StageError) or not isinstance(error, RuntimeError | OSError | RayActorError):
        return error
    what = "a worker died" if dead else f"{type(error).__name__}"
    told = " ".join(str(error).split())
    return StageError(f"training failed more than runtime.max_failures={max_failures} times, at last: {what}: {told}")


class _Post:
    """The driver's end of the mailbox, while training runs: hears messages in a thread, passes signals on."""

    def __init__(self, hear: Callable[..., None], signals: StopSignals) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.mailbox = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        self.hear, self.signals = hear, signals
        self.error: Exception | None = None
        self.told: float | None = None  # when the workers were asked to stop
        self.answered = False
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._listen, name="post", daemon=True)

    def __enter__(self) -> "_Post":
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.signals.held = False
        self.over.set()
        self.thread.join()
        if self.error is None:
            self._pass_on()
            self.error = ray.get(self.mailbox.failed.remote())

    def _listen(self) -> None:
        try:
            while not self.over.wait(LISTEN_INTERVAL):
                self._pass_on()
        except Exception as error:  # for the thread that waits for the workers to raise, when they have stopped
            self.error = error
            self.mailbox.ask_to_stop.remote()

    def _pass_on(self) -> None:
        if self.signals.name is not None and self.told is None:
            log.warning("%s: training stops after this step and is saved", self.signals.name)
            self.mailbox.ask_to_stop.remote()
            self.told = time.monotonic()
        for kind, *what in ray.get(self.mailbox.take.remote()):
            if kind == BEGUN:
                self.signals.held = True
            elif kind == SAID:
                log.log(*what)
            elif kind == STOPPING:
                self.answered = True
            else:
                self.hear(kind, *what)
        if self.told is not None and not self.answered and time.monotonic() - self.told > ANSWER:
            log.warning("no worker has answered for %.0f s: ending with the checkpoints that are there", ANSWER)
            self.answered = True
            self.signals.give_up()


class _ByMail(logging.Handler):
    """Has the driver log what a worker logs. What it prints comes there, too, but by way of files, in which the last
    lines of a run may stay."""

    def __init__(self, mailbox: Any) -> None:
        super().__init__()
        self.mailbox = mailbox

    def emit(self, record: logging.LogRecord) -> None:
        self.mailbox.put.remote(SAID, record.levelno, "%s", record.getMessage())


class _Poll:
    """Whether to stop: asks the mailbox once a second at most, and does not wait for the answer."""

    def __init__(self, mailbox: Any) -> None:
        self.mailbox = mailbox
        self.question = mailbox.asked_to_stop.remote()
        self.next = 0.0
        self.answer = False

    def __call__(self) -> bool:
        if not self.answer and time.monotonic() >= self.next and ray.wait([self.question], timeout=0)[0]:
            self.answer = bool(ray.get(self.question))
            self.question = self.mailbox.asked_to_stop.remote()
            self.next = time.monotonic() + 1
        return self.answer


@dataclass(frozen=True)
class Trial:
    """What became of one trial of a sweep.

    Args:
        name: Of its folder.
        setting: What was tried.
        last: What it has reported last, or nothing.
        error: Why it failed, or None.
    """

    name: str
    setting: dict[str, Any]
    last: dict[str, Any]
    error: str | None


def sweep(
    trial: Callable[[str, dict[str, Any], Callable[[dict[str, Any]], None]], None],
    axes: dict[str, tuple[Any, ...]],
    plan: _params.Tune,
    runtime: _params.Runtime,
    folder: Path,
    first_rung: int,
) -> list[Trial]:
    """Run trial(name, setting, report) by Ray Tune for many settings, within `cluster`; trials fail alone.

    The same call with the same folder goes on where an earlier one ended; trials that failed there are tried again.

    Args:
        trial: Reports {"step": ..., "fid": ...}, the last of them at the end; it runs on this node, takes no CPU of the
            cluster and starts what does.
        axes: The values of each part of a setting; a grid of them, or log-uniform from the least to the greatest,
            whole numbers where all are whole.
        plan: Search, scheduler, trials, seed and steps.
        runtime: Its trials and workers.
        folder: For Tune's own notes: pickles, so nobody else may write there.
        first_rung: The step after which, and after twice and four times as many, asha may stop a trial.

    Raises:
        StageError: If the cluster is too small for one trial.
    """
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials are in what is returned
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the older output can be silent
    with _signals_kept():
        from ray import tune
        from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
        from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
    room = trainings(runtime)
    at_once = min(runtime.trials or room, room)

    def trainable(config: dict[str, Any]) -> None:  # travels by value: what it imports is up to `trial`
        from ray import tune

        trial(tune.get_context().get_trial_id(), config, tune.report)

    here = tune.PlacementGroupFactory([{f"node:{ray.util.get_node_ip_address()}": 0.001}])
    bound = tune.with_resources(trainable, here)
    if plan.search == "grid":
        space, trials = {key: tune.grid_search(list(values)) for key, values in axes.items()}, 1
    else:
        space, trials = {key: _between(values, tune) for key, values in axes.items()}, plan.trials
    if plan.search == "tpe":
        from ray.tune.search.optuna import OptunaSearch

        search: Any = ConcurrencyLimiter(OptunaSearch(metric="fid", mode="min", seed=plan.seed), at_once)
    else:
        search = BasicVariantGenerator(max_concurrent=at_once, random_state=plan.seed)
    scheduler = (
        ASHAScheduler(time_attr="step", max_t=plan.steps, grace_period=first_rung, reduction_factor=2)
        if plan.scheduler == "asha"
        else FIFOScheduler()
    )
    if tune.Tuner.can_restore(folder / "tune"):
        log.info("going on with the sweep in %s", folder)
        tuner = tune.Tuner.restore(str(folder / "tune"), trainable=bound, param_space=space, restart_errored=True)
    else:
        tuner = tune.Tuner(
            bound,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="fid",
                mode="min",
                num_samples=trials,
                search_alg=search,
                scheduler=scheduler,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
        )
    found = tuner.fit()
    return [
        Trial(Path(each.path).name, each.config or {}, each.metrics or {}, _reason(each.error) if each.error else None)
        for each in found
    ]


def trainings(runtime: _params.Runtime) -> int:
    """How many trainings with runtime.workers have room in the cluster side by side, within `cluster`.

    Raises:
        StageError: If not even one has, which would wait for ever.
    """
    workers, kind = most(runtime.workers), "GPU" if _gpus() else "CPU"
    there = ray.cluster_resources().get(kind, 0)
    share = runtime.gpus_per_worker if _gpus() else 1
    if there < workers:
        raise StageError(
            f"runtime.workers={runtime.workers}: a trial needs {workers} {kind}s, the cluster has {there:g}: lower it, "
            "or wait for more nodes"
        )
    return int(there / (workers * share) + 1e-6)


def _between(values: tuple[float, ...], tune: Any) -> Any:
    """A value from the least to the greatest, log-uniform; a whole number where all are."""
    low, high = min(values), max(values)
    if low == high:
        return low
    return tune.lograndint(low, high + 1) if all(type(each) is int for each in values) else tune.loguniform(low, high)


def _reason(error: BaseException) -> str:
    """The last line of an error, which a trial raised."""
    return str(getattr(error, "cause", None) or error).strip().splitlines()[-1]


def shards(
    make: Callable[[], Callable[[Any], Any]], jobs: Sequence[Any], runtime: _params.Runtime
) -> Iterator[tuple[Any, Any]]:
    """Yield (job, make()(job)) in the order of completion; a worker that dies is replaced and its job repeated.

    There are runtime.actors workers, by default as many as the cluster's GPUs have room for by runtime.gpus_per_actor,
    or without GPUs one for each core: one thread each beats all threads on one batch. A job goes to a worker that
    is there, so that none waits for a node that has yet to come.

    Args:
        make: Called once on each worker; loads what all its jobs need. It travels once, so it may be large.
        jobs: Independent pieces of work, safe to repeat.
        runtime: Its actors, gpus_per_actor and max_failures.

    Raises:
        Exception: What a job raised.
        StageError: If a worker died more than runtime.max_failures times.
    """
    if not jobs:
        return
    options, slots = _slots(runtime)
    worker = ray.remote(max_restarts=runtime.max_failures, max_task_retries=runtime.max_failures, **options)(_Actor)
    made = put(make)
    actors = [worker.remote(_credentials()) for _ in range(min(slots, len(jobs)))]
    running: dict[Any, tuple[Any, Any]] = {actor.ready.remote(): (actor, _NOTHING) for actor in actors}
    waiting, left = list(reversed(jobs)), len(jobs)
    try:
        while left:
            (done,), _ = ray.wait(list(running), num_returns=1)
            actor, job = running.pop(done)
            try:
                result = ray.get(done)
            except RayTaskError as error:
                raise error.cause from error
            except RayActorError as error:
                raise StageError(
                    f"a worker died more than runtime.max_failures={runtime.max_failures} times; if memory ran out, "
                    f"lower runtime.micro_batch or runtime.actors: {' '.join(str(error).split())}"
                ) from error
            if waiting:
                following = waiting.pop()
                running[actor.run.remote(made, following)] = actor, following
            if job is not _NOTHING:
                left -= 1
                yield job, result
    finally:
        # Not when nobody refers to them any more, which may be late: a traceback does, and the next pool would wait.
        for actor in actors if ray.is_initialized() else ():
            ray.kill(actor)


_NOTHING = object()


def _slots(runtime: _params.Runtime) -> tuple[dict[str, float], int]:
    """What a worker of a pool takes of the cluster, and how many there are."""
    if gpus := _gpus():
        options, room = {"num_gpus": runtime.gpus_per_actor}, int(gpus / runtime.gpus_per_actor + 1e-6)
    else:
        # All there are, busy or not: those of a pool that has just ended are not free at once.
        options, room = {"num_cpus": 1.0}, int(ray.cluster_resources().get("CPU", 0))
    if runtime.actors is not None and runtime.actors > room and not given_address(runtime):
        what = f"{gpus:g} GPUs and runtime.gpus_per_actor={runtime.gpus_per_actor:g}" if gpus else f"{room} cores"
        raise StageError(f"runtime.actors={runtime.actors}: this machine has {what}, expected at most {room}, or null")
    return options, runtime.actors or max(1, room)


def _credentials() -> dict[str, str]:
    """What this process knows of S3; it travels by messages, as Ray's dashboard shows runtime environments."""
    return {key: value for key, value in os.environ.items() if key.startswith("AWS_")}


class _Actor:
    """A worker of a pool."""

    def __init__(self, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        torch.set_num_threads(1)
        logging.basicConfig(format="%(message)s")
        log.setLevel(logging.INFO)
        self.fn: Callable[[Any], Any] | None = None

    def ready(self) -> None:
        """Answers when the worker is there."""

    def run(self, make: Shared, job: Any) -> Any:
        """Do a job; the first one of a worker begins with make()."""
        if self.fn is None:
            self.fn = make.open()()
        return self.fn(job)


def meet(fn: Callable[[Any, World], Any], job: Any, runtime: _params.Runtime) -> list[Any]:
    """What fn(job, world) returns on each of runtime.workers, by rank, within `cluster`: workers that see each other as
    those of `train` do, but sooner, since Ray Train with its helpers is not started.

    Raises:
        Exception: What fn raised, or their meeting.
        StageError: If a worker died.
    """
    size = most(runtime.workers)
    options = {"num_gpus": runtime.gpus_per_worker} if _gpus() else {"num_cpus": 1.0}
    worker = ray.remote(max_restarts=0, **options)(_Guest)
    guests = [worker.remote(_credentials()) for _ in range(size)]
    try:
        place = ray.get(guests[0].invite.remote(size))
        return list(ray.get([guest.meet.remote(fn, job, rank, size, place) for rank, guest in enumerate(guests)]))
    except RayTaskError as error:
        raise error.cause from error
    except RayActorError as error:
        raise StageError(f"a worker died: {' '.join(str(error).split())}") from error
    finally:
        for guest in guests:
            ray.kill(guest)


class _Guest(_Actor):
    """A worker of a meeting."""

    def invite(self, size: int) -> tuple[str, int]:
        """Where the others, and this one, find each other."""
        address = ray.util.get_node_ip_address()
        self.place = TCPStore(address, 0, size, is_master=True, wait_for_workers=False)
        return address, self.place.port

    def meet(self, fn: Callable[[Any, World], Any], job: Any, rank: int, size: int, place: tuple[str, int]) -> Any:
        """fn(job, world) in a group of all guests."""
        device = torch.device("cuda:0" if ray.get_gpu_ids() else "cpu")
        if size > 1:
            torch.distributed.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=TCPStore(*place, size, is_master=False) if rank else self.place,
                rank=rank,
                world_size=size,
                timeout=MEETING,
            )
        return fn(job, World(rank, size, device, host=_group_of_cpus(size, device, MEETING)))


def _train_worker(config: dict[str, Any]) -> None:
    from ray.train import get_context
    from ray.train.torch import get_device

    os.environ.update(config["environment"])
    mailbox, context, device = config["mailbox"], get_context(), get_device()
    rank, size = context.get_world_rank(), context.get_world_size()
    if ray.get(mailbox.failed.remote()) is not None:
        return  # an error that another try would meet again: the driver raises it
    cores = max(1, _cores_of_node() // context.get_local_world_size())
    by_parts = device.type == "cpu" and config["side_by_side"]
    threads = min(cores, MOST_THREADS) if by_parts else 1
    torch.set_num_threads(cores // threads)
    host = _group_of_cpus(size, device, LONGEST)
    if rank == 0:
        log.setLevel(logging.INFO)
        log.addHandler(_ByMail(mailbox))
        log.propagate = False  # else Ray prints it, too
        mailbox.put.remote(BEGUN)
        log.info("%d worker%s, %s", size, "s" * (size > 1), _describe(device, cores))

    def tell(kind: str, *what: Any) -> None:
        mailbox.put.remote(kind, *what)

    stop = _Poll(mailbox) if rank == 0 else lambda: False
    try:
        config["fn"](config["job"], World(rank, size, device, threads, tell, stop, host))
    except Exception as error:
        # Ray Train, when it has lost a neighbour, ends the process group while we may still be waiting for that one.
        left = size > 1 and not torch.distributed.is_initialized()
        if not left and (isinstance(error, StageError) or not isinstance(error, RuntimeError | OSError)):
            ray.get(mailbox.fail.remote(error))
        raise
    ray.get(mailbox.failed.remote())  # comes after all that was told


def _group_of_cpus(size: int, device: torch.device, timeout: timedelta) -> Any:
    """What `World.host` is."""
    on_gpus = size > 1 and device.type == "cuda"
    return torch.distributed.new_group(backend="gloo", timeout=timeout) if on_gpus else None


def _describe(device: torch.device, cores: int) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"on CPUs, {cores} for each"


def _buckets(values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbouring tensors of one kind, in lists of up to BUCKET bytes."""
    some: list[Tensor] = []
    size = 0
    for value in values:
        if some and (size + value.nbytes > BUCKET or value.dtype != some[0].dtype):
            yield some
            some, size = [], 0
        some.append(value)
        size += value.nbytes
    yield some


def address(runtime: _params.Runtime) -> dict[str, str]:
    """The variables by which other programs on this machine find the cluster, within `cluster`."""
    return {"RAY_ADDRESS": str(ray.get_runtime_context().gcs_address), HERE: "1" if _local(runtime) else ""}


def _here() -> bool:
    """Whether the cluster at RAY_ADDRESS is a local one, which another program of ours has started."""
    return bool(os.environ.get(HERE))


def _local(runtime: _params.Runtime) -> bool:
    """Whether the cluster is a local one, ours or that of another program of ours."""
    return _here() or not given_address(runtime)


def most(workers: int | tuple[int, ...]) -> int:
    """The largest number of workers that a run may have."""
    return workers if isinstance(workers, int) else workers[-1]


def resources() -> dict[str, float]:
    """The "nodes", "CPU" and "GPU" of the cluster, busy or not, within `cluster`."""
    there = ray.cluster_resources()
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    return {"nodes": nodes, "CPU": there.get("CPU", 0.0), "GPU": there.get("GPU", 0.0)}


def given_address(runtime: _params.Runtime) -> str | None:
    """Of the cluster to connect to; None for one of our own on this machine."""
    return os.environ.get("RAY_ADDRESS") or runtime.ray_address


def _gpus() -> float:
    return float(ray.cluster_resources().get("GPU", 0))


def _cores() -> int:
    return torch.get_num_threads()


def _cores_of_node() -> int:
    """Of the worker's node: no more than Ray counts there, which knows of a container's share, or of other nodes on the
    same machine; threads of many small operations that wait for a core each burn the others'."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    return min(len(os.sched_getaffinity(0)), int(node["Resources"].get("CPU", 1)) or 1)


def _local_folder(name: str = "ray") -> str:
    """Short, since paths of Unix sockets must stay under 108 bytes; one for each user of the machine."""
    return str(Path(tempfile.gettempdir()) / f"ncsn-{name}-{os.getuid()}")
