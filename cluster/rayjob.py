"""Write the graph as a RayJob for KubeRay, with the images, resources and range of workers of cluster/kubernetes.yaml.

    python -m cluster.rayjob experiment=ncsnv2_cifar10 runtime.storage=s3://bucket/ncsn >job.yaml
    kubectl apply -f job.yaml

The arguments are those of `python -m pipeline.compose`. The code is that of the image. A job whose head dies starts
anew on a new cluster and goes on from the checkpoints on S3, which it therefore needs.
"""

import argparse
import copy
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

SETTINGS = Path(__file__).with_name("kubernetes.yaml")
DEFAULT = ["runtime.storage=s3://ncsn/runs"]
TRIES = 5  # new clusters, after the first
CODE = "/home/ncsn/ncsn/cluster/repro.py"  # in the image
KEPT = 600  # seconds for which a job that has ended can be looked at


def main(arguments: Sequence[str] | None = None) -> None:
    """Raises SystemExit, with a message, for settings with which a job could not go on after a failure."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.rayjob", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", type=Path, default=SETTINGS, help="in place of cluster/kubernetes.yaml")
    parser.add_argument("overrides", nargs="*", help=f"as of python -m pipeline.compose; without any: {DEFAULT[0]}")
    asked = parser.parse_args(arguments)
    try:
        job = rayjob(yaml.safe_load(asked.settings.read_text()), asked.overrides or DEFAULT)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print("# Written by `python -m cluster.rayjob` from cluster/kubernetes.yaml.")
    print(yaml.safe_dump(job, sort_keys=False, width=120), end="")


def rayjob(settings: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The RayJob; raises ValueError without a bucket."""
    given = dict(each.partition("=")[::2] for each in overrides)
    if not given.get("runtime.storage", "").startswith("s3://"):
        told = given.get("runtime.storage", "(not given)")
        raise ValueError(f"runtime.storage={told}: expected s3://bucket/prefix, since the disk of a Pod goes with it")
    types = settings["available_node_types"]
    worker = types["worker"]
    if "runtime.workers" not in given:
        overrides = [*overrides, f"runtime.workers=[{max(1, worker['min_workers'])},{worker['max_workers']}]"]
    cluster = {
        "rayVersion": importlib.metadata.version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": int(60 * settings["idle_timeout_minutes"])},
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": pod(types["head"])},
        "workerGroupSpecs": [
            {
                "groupName": "worker",
                "replicas": worker["min_workers"],
                "minReplicas": worker["min_workers"],
                "maxReplicas": worker["max_workers"],
                "rayStartParams": {},
                "template": pod(worker),
            }
        ],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": settings["cluster_name"],
            "namespace": settings["provider"]["namespace"],
            # All of the least number of Pods or none, where the batch scheduler of the cluster can do so.
            "labels": {"ray.io/gang-scheduling-enabled": "true"},
        },
        "spec": {
            "entrypoint": " ".join(["python", CODE, *overrides]),
            "submissionMode": "K8sJobMode",
            "backoffLimit": TRIES,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEPT,
            "rayClusterSpec": cluster,
        },
    }


def pod(node_type: dict[str, Any]) -> dict[str, Any]:
    """A node's Pod; the operator says what runs in it, with which account."""
    template: dict[str, Any] = copy.deepcopy(node_type["node_config"])
    template["spec"].pop("serviceAccountName", None)
    template["spec"]["restartPolicy"] = "Never"
    template["spec"]["containers"][0].pop("command", None)
    return template


if __name__ == "__main__":
    main()
