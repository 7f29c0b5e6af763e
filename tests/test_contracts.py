"""What the repository promises about itself."""

import ast
import importlib.metadata
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from pipeline import ablation, techniques, tune

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def torch_and_numpy(tmp_path_factory):
    """A folder with links to torch, numpy and what those two require: an environment with nothing else installed."""
    folder = tmp_path_factory.mktemp("site")
    wanted, seen = ["torch", "numpy"], set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a requirement of another platform
        for requirement in distribution.requires or []:
            if "extra ==" not in requirement:
                wanted.append(re.match(r"[\w.-]+", requirement).group().lower())
        for top in {file.parts[0] for file in distribution.files}:
            link = folder / top
            if top != ".." and not link.exists():
                link.symlink_to(distribution.locate_file(top))
    return folder


def _run_with(folder, code):
    """Run code in an interpreter whose only packages are those in `folder`."""
    start = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n"
    return subprocess.run(
        [sys.executable, "-S", "-E", "-c", start + code], capture_output=True, text=True, cwd=folder, check=False
    )


def test_the_library_needs_torch_and_numpy_alone(torch_and_numpy):
    code = (
        "import pkgutil, importlib, ncsn\n"
        "for module in pkgutil.walk_packages(ncsn.__path__, 'ncsn.'): importlib.import_module(module.name)\n"
        "print(sorted(name for name in sys.modules if name.startswith('ncsn.')))"
    )
    done = _run_with(torch_and_numpy, code)
    assert done.returncode == 0, done.stderr
    assert "'ncsn.networks.ncsnv2'" in done.stdout


@pytest.mark.parametrize("package", ["tqdm", "ray", "scipy", "safetensors"])
def test_that_environment_has_nothing_else(torch_and_numpy, package):
    done = _run_with(torch_and_numpy, f"import {package}")
    assert f"No module named '{package}'" in done.stderr


def test_importing_the_library_loads_nothing_more_than_torch_does():
    code = (
        "import sys, torch, numpy\nbefore = set(sys.modules)\nimport ncsn, ncsn.training, ncsn.samplers, ncsn.metrics\n"
    )
    code += "print({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    modules = eval(done.stdout)
    assert modules <= {"ncsn", "torch", "numpy"}


def test_the_lock_names_no_index_and_pins_everything():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.match(r"[\w.-]+(\[[\w,-]+\])?==", pin) for pin in pins)
    assert not any("://" in line or "--index" in line or "--find-links" in line for line in lines)


def test_the_lock_covers_every_declared_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    pinned = {re.split(r"[=\[;]", line)[0].strip() for line in (ROOT / "requirements.lock").read_text().splitlines()}
    for requirement in declared:
        assert re.match(r"[\w.-]+", requirement).group().lower() in pinned


def test_stages_list_their_own_module_and_existing_dependencies_and_never_runtime():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert list(stages) == ["prepare", "schedule", "features", "train", "select", "sample", "evaluate", "report"]
    outs = {out for stage in stages.values() for out in [*stage.get("outs", []), *stage.get("metrics", [])]}
    for name, stage in stages.items():
        assert stage["cmd"] == f"python -m pipeline.{name}"
        assert f"pipeline/{name}.py" in stage["deps"]
        for dependency in stage["deps"]:
            assert dependency in outs or (ROOT / dependency).exists(), dependency
        assert not any(key.startswith("runtime") for key in stage.get("params", []))


def test_the_figures_are_a_graph_of_their_own_that_runs_in_the_root():
    stages = yaml.safe_load((ROOT / "sweeps" / "dvc.yaml").read_text())["stages"]
    main = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    outs = {out for stage in main.values() for out in stage.get("outs", [])}
    assert list(stages) == ["figures", "strips", "frontier", "likelihood", "tune", "ablation", "techniques"]
    for name, stage in stages.items():
        assert stage["cmd"] == f"python -m pipeline.{name}"
        assert stage["wdir"] == ".."
        assert stage["outs"] == [f"out/{name}", *(["conf/noise/tuned.yaml"] if name == "tune" else [])]
        assert f"pipeline/{name}.py" in stage["deps"]
        assert all(path in outs or (ROOT / path).exists() for path in stage["deps"])
    assert not any(path.startswith("out/") for path in stages["figures"]["deps"])
    for module in (tune, ablation, techniques):
        stage = stages[module.OUT.name]
        code = {f"pipeline/{name}.py" for name in module.CODE}
        assert code == {path for path in stage["deps"] if path.startswith("pipeline/") and path.endswith(".py")}
        assert set(stage["params"]) == set(module.SECTIONS)


TYPES = {"Score"}  # names that are annotations alone: where nothing else is imported, no result depends on the module


def _imports(path):
    """(module, name) of what a source file imports of ours, at any place in it, but for `TYPES`."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("ncsn", "pipeline"):
            for name in node.names:
                if name.name not in TYPES:
                    yield node.module, name.name
        elif isinstance(node, ast.Import):
            assert not any(name.name.partition(".")[0] in ("ncsn", "pipeline") for name in node.names), path


def _called(path):
    """The files of ours that a source file calls: parts of ncsn and private modules at any remove, stages at none."""
    found, waiting = set(), [path]
    while waiting:
        for module, name in _imports(waiting.pop()):
            inner = f"{module}.{name}".replace(".", "/") + ".py"
            file = inner if (ROOT / inner).is_file() else module.replace(".", "/") + ".py"
            if module.startswith("ncsn.networks"):
                if "ncsn/networks" not in found:  # stages list the folder as one
                    found.add("ncsn/networks")
                    waiting.extend((ROOT / "ncsn/networks").glob("*.py"))
            elif file not in found:
                found.add(file)
                if file.startswith(("ncsn/", "pipeline/_")):
                    waiting.append(file)
    return found


def test_imports_are_followed():
    assert {"ncsn/losses.py", "ncsn/random.py", "ncsn/networks", "pipeline/prepare.py"} < _called("pipeline/train.py")
    assert _called("ncsn/networks/unet.py") == {"ncsn/networks", "ncsn/noise.py", "ncsn/sde.py"}
    assert _called("ncsn/samplers.py") == {"ncsn/noise.py", "ncsn/ode.py", "ncsn/sde.py"}
    assert _called("pipeline/_pictures.py") == {
        "ncsn/images.py",
        *(f"pipeline/_{name}.py" for name in ("params", "stage", "store")),
    }


@pytest.mark.parametrize("graph", ["dvc.yaml", "sweeps/dvc.yaml"])
def test_stages_depend_on_all_they_call(graph):
    stages = yaml.safe_load((ROOT / graph).read_text())["stages"]
    everything = stages | yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for name, stage in stages.items():
        for file in _called(f"pipeline/{name}.py"):
            if file.startswith("ncsn/"):
                assert {file, "ncsn"} & set(stage["deps"]), f"{graph}: {name} lacks {file}"
            elif not file.startswith("pipeline/_"):  # a stage: its output stands for it
                other = everything[Path(file).stem]
                its = {file, *other.get("outs", []), *other.get("metrics", [])}
                assert its & set(stage["deps"]), f"{graph}: {name} lacks {file}, or what it writes"


def test_analytics_of_dvc_are_off():
    assert "analytics = false" in (ROOT / ".dvc" / "config").read_text()


def test_every_stage_has_a_help_text():
    stages = ["prepare", "schedule", "features", "train", "select", "sample", "evaluate", "report", "figures", "strips"]
    stages += [
        "frontier",
        "likelihood",
        "tune",
        "ablation",
        "techniques",
        "compose",
        "fetch",
        "estimate",
        "doctor",
        "compare",
    ]
    code = f"""
import runpy, sys
for stage in {stages}:
    sys.argv = [stage, "--help"]
    try:
        runpy.run_module("pipeline." + stage, run_name="__main__")
    except SystemExit as end:
        assert not end.code, stage
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    for stage in stages:
        assert f"usage: python -m pipeline.{stage}" in done.stdout
