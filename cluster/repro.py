"""Run the graph on the cluster on whose head this runs: compose params.yaml, look whether all is well, `dvc repro`.

    ray submit --start cluster/slurm.yaml cluster/repro.py -- experiment=ncsnv2_cifar10 runtime.workers=[1,8]

The arguments are those of `python -m pipeline.compose`; without any, params.yaml stays as it is. Words that set nothing
are the stages to run, with what they need (`train`); all by default. The exit status is the graph's. After a crash, or
Ctrl-C, the same command goes on. Told by SIGUSR1, it lets the stage that runs save, and ends with AGAIN;
.dvc/tmp/cluster.lock says which process to tell.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import ray

AGAIN = 75
PATIENCE = 24 * 3600.0  # seconds that the first worker may wait in a queue
POLL, SIGN_OF_LIFE = 1.0, 30.0


def main(words: list[str]) -> int:
    """The exit status of the first command that fails, or 0."""
    overrides = [word for word in words if "=" in word or word.startswith("~")]
    stages = [word for word in words if word not in overrides]
    told: list[int] = []
    signal.signal(signal.SIGINT, lambda *_: None)  # comes to the stages too; we pass on how they end
    signal.signal(signal.SIGUSR1, lambda *_: told.append(save()))
    python = [sys.executable, "-m"]
    os.environ["RAY_ADDRESS"] = head()
    if not Path(".git").exists():  # the code was copied here
        subprocess.run(["dvc", "config", "--local", "core.no_scm", "true"], check=True)
    commands = [[*python, "pipeline.compose", *overrides]] if overrides else []
    commands += [[*python, "pipeline.doctor"], ["dvc", "repro", *stages]]
    Path(".dvc/tmp").mkdir(exist_ok=True)
    with open(".dvc/tmp/cluster.lock", "a+") as lock:
        wait_until(lambda: locked(lock.fileno()), "another `dvc repro` of this clone to end")
        lock.truncate(0)
        print(os.getpid(), file=lock, flush=True)
        for command in commands:
            print(f"$ {' '.join(command)}", flush=True)
            status = subprocess.run(command, check=False).returncode
            if told:
                return AGAIN
            if status:
                return abs(status)
    return 0


def save() -> int:
    """Tell the stages that run to save and to end; how many they are."""
    stages = [each for each in psutil.Process().children(recursive=True) if is_stage(each)]
    for stage in stages:
        stage.send_signal(signal.SIGUSR1)
    return len(stages)


def is_stage(process: psutil.Process) -> bool:
    """Whether this is `python -m pipeline.NAME`, not one of its own processes."""
    words = process.cmdline()
    return words[1:2] == ["-m"] and words[2:3] != [] and words[2].startswith("pipeline.")


def head() -> str:
    """The address of the cluster, when it has its first worker."""
    ray.init(os.environ.get("RAY_ADDRESS", "auto"), logging_level="ERROR", log_to_driver=False)
    address = str(ray.get_runtime_context().gcs_address)
    wait_until(lambda: any(ray.cluster_resources().get(unit, 0) for unit in ("CPU", "GPU")), "the first worker")
    ray.shutdown()
    return address


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Wait, and say so; exits after PATIENCE."""
    since, said = time.monotonic(), -SIGN_OF_LIFE
    while not holds():
        waited = time.monotonic() - since
        if waited > PATIENCE:
            sys.exit(
                f"error: waited {waited / 3600:.0f} h for {what}: see the queue, and resources in the cluster's yaml"
            )
        if waited - said >= SIGN_OF_LIFE:
            print(f"waiting for {what}, {waited:.0f} s", flush=True)
            said = waited
        time.sleep(POLL)


def locked(file: int) -> bool:
    """Whether a lock was to be had."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    os.chdir(os.environ.get("CLUSTER_ROOT") or Path(__file__).parent.parent)
    sys.exit(main([each for each in sys.argv[1:] if each not in ("--", "-S")]))
