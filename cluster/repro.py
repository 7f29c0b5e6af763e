"""Run the graph on the cluster on whose head this runs: compose params.yaml, look whether all is well, `dvc repro`.

    ray submit --start cluster/slurm.yaml cluster/repro.py -- experiment=ncsnv2_cifar10 runtime.workers=[1,8]

The arguments are those of `python -m pipeline.compose`; without any, params.yaml stays as it is. The exit status is the
graph's. After a crash the same command goes on.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import ray

PATIENCE = 24 * 3600.0  # seconds that the first worker may wait in a queue
SIGN_OF_LIFE = 30.0


def main(overrides: list[str]) -> int:
    """The exit status of the first command that fails, or 0."""
    python = [sys.executable, "-m"]
    os.environ["RAY_ADDRESS"] = head()
    commands = [[*python, "pipeline.compose", *overrides]] if overrides else []
    commands += [[*python, "pipeline.doctor"], ["dvc", "repro"]]
    for command in commands:
        print(f"$ {' '.join(command)}", flush=True)
        if status := subprocess.run(command, check=False).returncode:
            return status
    return 0


def head() -> str:
    """The address of the cluster, when it has its first worker."""
    ray.init("auto", logging_level="ERROR", log_to_driver=False)
    address, since, said = str(ray.get_runtime_context().gcs_address), time.monotonic(), -SIGN_OF_LIFE
    while not any(ray.cluster_resources().get(unit, 0) for unit in ("CPU", "GPU")):
        waited = time.monotonic() - since
        if waited > PATIENCE:
            sys.exit(f"error: no worker came in {waited / 3600:.0f} h: see squeue, and resources in the cluster's yaml")
        if waited - said >= SIGN_OF_LIFE:
            print(f"waiting for the first worker, {waited:.0f} s", flush=True)
            said = waited
        time.sleep(1)
    ray.shutdown()
    return address


if __name__ == "__main__":
    os.chdir(os.environ.get("CLUSTER_ROOT") or Path(__file__).parent.parent)
    sys.exit(main([each for each in sys.argv[1:] if each not in ("--", "-S")]))
