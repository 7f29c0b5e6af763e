"""The benchmarks: what they print, and that their numbers belong together; no speed is judged."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_contracts import torch_and_numpy  # noqa: F401  a fixture

ROOT = Path(__file__).parent.parent
SCRIPT, SAMPLING = (ROOT / "benchmarks" / f"{name}_step.py" for name in ("train", "sample"))
TINY = ["--width", "4", "--resolution", "8", "--channels", "1", "--batch", "4", "--threads", "1", "--device", "cpu"]


def _module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module."""
    return _module(SCRIPT)


@pytest.fixture(scope="module")
def sampling():
    """The other one."""
    return _module(SAMPLING)


def _alone(script, arguments, torch_and_numpy):  # noqa: F811
    """What the script prints where there is nothing but torch and numpy."""
    code = f"""import sys; sys.path.insert(0, {str(torch_and_numpy)!r}); sys.argv = {[str(script), *arguments]!r}
import runpy; runpy.run_path({str(script)!r}, run_name="__main__")"""
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", code], capture_output=True, text=True, cwd=torch_and_numpy, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _problem(benchmark, **changes):
    return benchmark.Problem(**{"model": "ncsnv2", "width": 4, "channels": 1, "resolution": 8, "batch": 4} | changes)


def _step(benchmark, **switches):
    (step,) = benchmark.steps_of(_problem(benchmark), [benchmark.Switches(**switches)], torch.device("cpu")).values()
    return step


def test_prints_one_json_object_whose_numbers_belong_together_with_torch_and_numpy_alone(torch_and_numpy):  # noqa: F811
    rows = ["bf16_channels_last", "fp32_channels_last_plain_adam", "fp32_channels_last_loop_ema"]
    report = _alone(SCRIPT, [*TINY, "--steps", "2", "--repeats", "3", "--rows", *rows], torch_and_numpy)
    assert report["machine"].keys() == {"cpu", "cores", "gpu"}
    assert report["torch"] == torch.__version__
    assert [row["name"] for row in report["rows"]] == ["fp32", *rows]
    assert report["rows"][0]["ratio"] == 1
    assert report["ceiling_tflops"].keys() == {"fp32", "bf16"}
    # a backward pass has twice the products of a forward one, less those towards the image
    assert 2.7 < report["flops_per_image"]["step"] / report["flops_per_image"]["forward"] < 3
    for row in report["rows"]:
        assert row["tflops"] == pytest.approx(row["images_per_second"] * report["flops_per_image"]["step"] / 1e12)
        assert row["share_of_ceiling"] == pytest.approx(row["tflops"] / report["ceiling_tflops"][row["precision"]])
        assert row["ratio_range"][0] <= row["ratio"] <= row["ratio_range"][1]
        assert list(row["parts_ms"]) == ["data_and_draws", "forward", "backward", "optimizer", "ema"]
        assert all(part > 0 for part in row["parts_ms"].values())
        assert row["peak_memory_gib"] is None


def test_counted_operations_are_those_of_the_published_network(benchmark):
    flops = _problem(benchmark, width=128, channels=3, resolution=32).flops()
    assert flops["forward"] / 1e9 == pytest.approx(19.786, rel=1e-3)
    first = 2 * 3 * 128 * 9 * 32 * 32
    assert flops["step"] == pytest.approx(3 * flops["forward"] - first, rel=1e-6)


@pytest.mark.parametrize(
    "switches",
    [{"channels_last": True}, {"adam": "foreach"}, {"adam": "plain"}, {"ema": "loop"}, {"compile": True}],
    ids=str,
)
def test_a_switch_changes_the_speed_alone(benchmark, switches, monkeypatch):
    monkeypatch.setattr(benchmark.torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain, other = _step(benchmark), _step(benchmark, **switches)
    for step in (plain, other):
        for _ in range(3):
            step()
        step.parts()
    assert plain.state.step == other.state.step == 4
    for kind in ("model", "ema"):
        mine, its = (getattr(step.state, kind) for step in (plain, other))
        mine, its = (each if kind == "model" else each.model for each in (mine, its))
        for a, b in zip(mine.parameters(), its.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # a tenth of what a step of Adam moves
    assert (other.forward is not other.state.model) == other.switches.compile


def test_names_of_rows_tell_what_differs_from_the_baseline(benchmark):
    assert benchmark.BASELINE.name == "fp32"
    assert benchmark.Switches("bf16", channels_last=True, compile=True).name == "bf16_channels_last_compile"
    cpu, cuda = ([row.name for row in benchmark.all_switches(device)] for device in ("cpu", "cuda"))
    assert set(cpu) < set(cuda)
    assert {"tf32_channels_last", "fp32_channels_last_host_data"} < set(cuda) - set(cpu)
    assert len(set(cuda)) == len(cuda) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "fp16"], "--rows fp16: expected one of fp32, "),
        (["--clock", "cpu", "--threads", "2"], "--clock cpu: expected --device cpu --threads 1"),
        (["--batch", "0"], "--batch 0: expected at least 1"),
    ],
)
def test_bad_options_are_named(benchmark, arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse([*arguments, "--device", "cpu"])
    assert message in capsys.readouterr().err


def test_ray_train_and_ddp_make_the_same_steps_side_by_side():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *TINY, "--steps", "2", "--repeats", "1", "--compare", "ray", "--workers", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rates = report["images_per_second"]
    assert report["workers"] == 2
    assert rates.keys() == {"ray", "ddp"}
    assert report["ray_to_ddp"] == pytest.approx(rates["ray"] / rates["ddp"])


def test_sampling_steps_are_told_with_torch_and_numpy_alone(torch_and_numpy):  # noqa: F811
    arguments = ["--steps", "2", "--repeats", "3", "--nfe", "100", "--rows", "fp32", "bf16"]
    report = _alone(SAMPLING, [*TINY, *arguments], torch_and_numpy)
    assert [row["name"] for row in report["rows"]] == ["plain", "fp32", "bf16"]
    assert report["rows"][0]["ratio"] == 1
    for row in report["rows"]:
        assert row["evaluations_per_second"] == pytest.approx(100 * row["images_per_second"])
        assert row["tflops"] == pytest.approx(row["evaluations_per_second"] * report["flops_per_evaluation"] / 1e12)
        assert row["share_of_ceiling"] == pytest.approx(row["tflops"] / report["ceiling_tflops"][row["precision"]])
        assert row["ratio_range"][0] <= row["ratio"] <= row["ratio_range"][1]
        parts = row["parts_ms"]
        assert all(value > 0 for value in parts.values())
        step = parts["network"] + parts["noise"] + parts["update"]
        assert row["noise_share"] == pytest.approx(parts["noise"] / step)
        assert row["update_share"] == pytest.approx(parts["update"] / step)


def test_rows_draw_what_the_plain_network_draws(sampling, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    problem, device = sampling.Problem("ncsnv2", 4, 1, 8, 4), torch.device("cpu")
    steps = {row.name: sampling.Step(problem, row, device) for row in sampling.all_switches("cpu")}
    assert list(steps) == ["plain", "fp32", "fp32_compile", "bf16", "bf16_compile"]
    for step in steps.values():
        step(3)
        assert step.parts(1).keys() == {"network", "noise", "update", "randn"}
    for name, step in steps.items():
        precise = {} if "bf16" not in name else {"rtol": 0, "atol": 1e-3}
        torch.testing.assert_close(step.x.contiguous(), steps["plain"].x, **precise)
    rows = [row.name for row in sampling.all_switches("cuda")]
    assert len(set(rows)) == len(rows) == 13
    assert "tf32_graph" in rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "fp16"], "--rows fp16: expected one of plain, fp32, "),
        (["--workers", "1"], "--workers 1: expected at least 2"),
        (["--nfe", "0"], "--nfe 0: expected at least 1"),
    ],
)
def test_bad_options_of_sampling_are_named(sampling, arguments, message, capsys):
    with pytest.raises(SystemExit):
        sampling.parse([*arguments, "--device", "cpu"])
    assert message in capsys.readouterr().err


def test_one_worker_and_two_are_told_side_by_side():
    done = subprocess.run(
        [sys.executable, str(SAMPLING), *TINY, "--steps", "3", "--repeats", "1", "--workers", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["workers"] == 2
    for kind in ("drawing", "whole"):
        rates = report["evaluations_per_second"][kind]
        assert report["scaling"][kind] == pytest.approx(rates["2"] / rates["1"])


@pytest.mark.parametrize(
    ("script", "other", "flags"),
    [(SCRIPT, "beside_ddp", ["--compare", "ray"]), (SAMPLING, "pool_scaling", [])],
    ids=["train", "sample"],
)
def test_what_ray_tells_meanwhile_is_not_among_the_numbers(script, other, flags, monkeypatch, capsys):
    module = _module(script)

    def measure(*arguments, **options):
        print("(raylet) Task _Actor.ready failed.")
        return {"workers": options["workers"]}

    monkeypatch.setattr(f"benchmarks.{other}.measure", measure)
    monkeypatch.setattr(sys, "argv", [str(script), *TINY, *flags, "--workers", "2"])
    module.main()
    told = capsys.readouterr()
    assert json.loads(told.out)["workers"] == 2
    assert "ready failed" in told.err
