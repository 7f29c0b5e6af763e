"""The container image, the RayJob and what Ray uploads: what is in them, and that an operator would take them."""

import gzip
import io
import json
import re
import sys
import tarfile
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import docker
import jsonschema
import pytest
import yaml

from cluster import rayjob
from tests.clones import ROOT, repository, run

SETTINGS = yaml.safe_load((ROOT / "cluster" / "kubernetes.yaml").read_text())
JUNK = ("data/pictures.npy", "runs/state", "out/x", ".git/x", ".venv/x", "mlflow.db", "ncsn/__pycache__/x.pyc")
JUNK += ("conf/noise/tuned.yaml", ".dvc/cache/x", ".dvc/tmp/x", "tests/x", "docs/x", "s3data/x", "secret.txt")


# -- the image


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = repository(tmp_path_factory.mktemp("image"))
    for name in JUNK:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("junk")
    return folder


@pytest.fixture(scope="module")
def sent(clone):
    """The files that Docker's client sends of a clone, to a daemon of ours, which only looks at them."""
    names = []

    class Daemon(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = io.BytesIO(self.rfile.read(int(self.headers["Content-Length"])))
            with tarfile.open(fileobj=body) as tar:
                names.extend(tar.getnames())
            self.send_response(200)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Daemon)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with closing(docker.APIClient(f"tcp://127.0.0.1:{server.server_port}", version="1.44")) as client:
        list(client.build(path=str(clone), dockerfile="cluster/Dockerfile"))
    server.shutdown()
    server.server_close()
    return {name for name in names if (clone / name).is_file()} - {".dockerignore"}  # which the daemon reads


def test_the_image_has_the_code_and_nothing_else(clone, sent):
    assert not sent & set(JUNK)
    assert {name.split("/")[0] for name in sent} == {
        *(".dvc", ".dvcignore", "LICENSE", "README.md", "cluster", "conf", "dvc.yaml", "ncsn", "params.yaml"),
        *("pipeline", "pyproject.toml", "requirements.lock", "sweeps"),
    }
    assert sum((clone / name).stat().st_size for name in sent) < 2 * 2**20
    recipe = (clone / "cluster" / "Dockerfile").read_text().replace("\\\n", " ")
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.*)$", recipe, re.MULTILINE):
        copied |= {word for word in line.split()[:-1] if not word.startswith("--")}
    for name in copied:  # what is not in the context cannot be copied, what nothing copies need not be in it
        assert any(each == name or each.startswith(f"{name}/") for each in sent), name
    assert all(any(each == name or each.startswith(f"{name}/") for name in copied) for each in sent)
    assert re.findall(r"^USER (\w+)$", recipe, re.MULTILINE) == ["ncsn"]
    assert "--constraint requirements.lock" in recipe


def test_what_ray_uploads_is_small():
    """The packages that `pipeline._ray.cluster` sends to a cluster, as they lie in a clone."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for package in ("ncsn", "pipeline"):
            tar.add(ROOT / package)
    assert packed.tell() < 10 * 2**20


# -- the job for KubeRay


def closed(schema):
    """An OpenAPI schema of a custom resource as a JSON schema, as strict as an API server with field validation.

    Fields that are not named are refused; what has a default need not be there.
    """
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    names = schema.get("properties")
    out = {key: closed(value) for key, value in schema.items() if key not in ("format", "nullable", "properties")}
    out = {key: value for key, value in out.items() if not key.startswith("x-kubernetes-")}
    if isinstance(names, dict):
        out["properties"] = {name: closed(value) for name, value in names.items()}
        if "additionalProperties" not in schema and "x-kubernetes-preserve-unknown-fields" not in schema:
            out["additionalProperties"] = False
        out["required"] = [name for name in schema.get("required", []) if "default" not in names.get(name, {})]
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return out


@pytest.fixture(scope="module")
def operator():
    """KubeRay's schema of a RayJob (Apache-2.0), of its CRD without the descriptions."""
    schema = json.loads(gzip.decompress((Path(__file__).parent / "rayjob_v1.json.gz").read_bytes()))
    schema["properties"]["metadata"]["x-kubernetes-preserve-unknown-fields"] = True
    return jsonschema.Draft202012Validator(closed(schema))


def test_the_operator_takes_the_job(operator):
    job = rayjob.rayjob(SETTINGS, ["runtime.storage=s3://bucket/prefix"])
    assert list(operator.iter_errors(job)) == []
    job["spec"]["backOffLimit"] = 1
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] = "many"
    told = [error.message for error in operator.iter_errors(job)]
    assert len(told) == 2
    assert "'backOffLimit' was unexpected" in told[0] + told[1]


def test_the_job_has_the_settings_of_the_launcher():
    job = rayjob.rayjob(SETTINGS, ["runtime.storage=s3://bucket/prefix", "noise.L=10"])
    assert job["spec"]["entrypoint"].endswith("runtime.storage=s3://bucket/prefix noise.L=10 runtime.workers=[1,8]")
    assert job["spec"]["backoffLimit"] > 0
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    asked = SETTINGS["available_node_types"]["worker"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (asked["min_workers"], asked["max_workers"])
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "command" not in workers["template"]["spec"]["containers"][0]  # the operator's
    assert "command" in asked["node_config"]["spec"]["containers"][0]
    with_workers = rayjob.rayjob(SETTINGS, ["runtime.storage=s3://bucket/prefix", "runtime.workers=2"])
    assert with_workers["spec"]["entrypoint"].endswith("runtime.workers=2")


def test_the_job_in_the_repository_is_as_the_command_writes_it():
    told = run(sys.executable, "-m", "cluster.rayjob", cwd=ROOT)
    assert told.stdout == (ROOT / "cluster" / "kubernetes" / "rayjob.yaml").read_text()


def test_a_job_without_a_bucket_is_refused():
    told = run(sys.executable, "-m", "cluster.rayjob", "noise.L=10", cwd=ROOT)
    assert told.returncode == 1
    assert told.stdout.startswith("error: runtime.storage=(not given): expected s3://bucket/prefix")
