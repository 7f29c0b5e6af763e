"""The container image, the RayJob and what Ray uploads: what is in them, and that an operator would take them."""

import gzip
import io
import json
import re
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

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


def kept(clone):
    """The files that .dockerignore leaves: the last pattern that matches a file, or a folder of it, decides."""
    patterns = [line for line in (clone / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]

    def left_out(name):
        out = False
        parts = name.split("/")
        folders = ["/".join(parts[: k + 1]) for k in range(len(parts))]
        for pattern in patterns:
            wanted = re.escape(pattern.lstrip("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
            if any(re.fullmatch(wanted, folder) for folder in folders):
                out = not pattern.startswith("!")
        return out

    files = [str(path.relative_to(clone)) for path in clone.rglob("*") if path.is_file()]
    return {name for name in files if not left_out(name)}


def test_the_image_has_the_code_and_nothing_else(clone):
    files = kept(clone)
    assert not files & set(JUNK)
    assert {name.split("/")[0] for name in files} == {
        *(".dvc", ".dvcignore", "LICENSE", "README.md", "cluster", "conf", "dvc.yaml", "ncsn", "params.yaml"),
        *("pipeline", "pyproject.toml", "requirements.lock", "sweeps"),
    }
    assert sum((clone / name).stat().st_size for name in files) < 2 * 2**20
    recipe = (clone / "cluster" / "Dockerfile").read_text().replace("\\\n", " ")
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.*)$", recipe, re.MULTILINE):
        copied |= {word for word in line.split()[:-1] if not word.startswith("--")}
    for name in copied:  # what is not in the context cannot be copied, what nothing copies need not be in it
        assert any(each == name or each.startswith(f"{name}/") for each in files), name
    assert all(any(each == name or each.startswith(f"{name}/") for name in copied) for each in files)
    assert re.findall(r"^USER (\w+)$", recipe, re.MULTILINE) == ["ncsn"]
    assert "--constraint requirements.lock" in recipe


@pytest.mark.docker
def test_the_docker_client_sends_just_that(clone):
    """To a daemon of ours, which only looks at what it is sent."""
    sent = []

    class Daemon(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            self.answer(200, b"OK" if "_ping" in self.path else b"{}")

        do_HEAD = do_GET

        def do_POST(self):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            with tarfile.open(fileobj=io.BytesIO(body)) as tar:
                sent.extend(tar.getnames())
            self.answer(500, b'{"message": "seen"}')

        def answer(self, code, body):
            self.send_response(code)
            for name, value in (("Api-Version", "1.50"), ("OSType", "linux"), ("Content-Length", str(len(body)))):
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

    server = HTTPServer(("127.0.0.1", 0), Daemon)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = {"DOCKER_HOST": f"tcp://127.0.0.1:{server.server_port}", "DOCKER_BUILDKIT": "0", "HOME": str(clone.parent)}
    told = run("docker", "build", "-f", "cluster/Dockerfile", ".", cwd=clone, **where)
    server.shutdown()
    server.server_close()
    assert "seen" in told.stdout
    files = {name for name in sent if (clone / name).is_file()}
    assert files - {"cluster/Dockerfile", ".dockerignore"} == kept(clone) - {"cluster/Dockerfile"}


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
