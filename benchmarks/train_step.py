"""Measure a training step: images/s, TFLOP/s and time per part as JSON, for each switch that could make it faster.

Torch and numpy suffice. A row of the table is one setting of the switches; its name lists those that are not the
baseline's (fp32, NCHW, eager, fused Adam, foreach EMA, data on the device). All rows take turns, `--repeats` times, and
each number is a median, so that a neighbour's load hits all alike. TFLOP/s come from counted operations (convolutions
and matrix products, forward and backward), the share from the best rate of a large square matmul in the row's
precision, measured in the same turns. The parts are timed one by one, each waited for, so on a GPU their sum exceeds
the step. Training itself is `ncsn.training.train_step` on the data and draws of `ncsn`.

  python benchmarks/train_step.py --batch 128                     NCSNv2 for CIFAR-10
  python benchmarks/train_step.py --rows fp32 bf16_channels_last  these rows only; --list names all
  python benchmarks/train_step.py --compare ray --workers 2       Ray Train beside torch's own DDP; needs all of ours
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where ncsn is, which need not be installed

from ncsn import images, random
from ncsn.losses import denoising_score_matching
from ncsn.networks import NCSN, NETWORKS, ScoreNetwork
from ncsn.noise import geometric_sigmas
from ncsn.training import EMA, TrainState, data_order, train_draws, train_step, update

IMAGES = 10_000  # of the data, random bytes: what is on them does not change the time
SQUARE = {"cuda": 8192, "cpu": 1024}  # side of the matrices whose product is the ceiling
DECAY = 0.999
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PARTS = ("data_and_draws", "forward", "backward", "optimizer", "ema")


_clock = CLOCKS["wall"]


@dataclass(frozen=True)
class Switches:
    """How a step is computed; the defaults are the baseline.

    Args:
        precision: "fp32", "tf32" (GPUs alone) or "bf16" (autocast).
        channels_last: The memory format of weights and images.
        compile: The network by torch.compile.
        adam: "fused", "foreach" or "plain", a loop over the parameters.
        ema: "foreach", the library's, or "loop".
        data: On the "device", or read from the "host" at each step.
    """

    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    adam: str = "fused"
    ema: str = "foreach"
    data: str = "device"

    @property
    def name(self) -> str:
        """The precision, then all that is not as in the baseline."""
        parts = [self.precision]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(field.name if value is True else f"{value}_{field.name}")
        return "_".join(parts)


BASELINE = Switches()


def all_switches(device: str) -> list[Switches]:
    """The rows: precision by memory format by compilation, and the others one by one on channels_last."""
    precisions = ["fp32", "tf32", "bf16"] if device == "cuda" else ["fp32", "bf16"]
    rows = [Switches(*each) for each in itertools.product(precisions, [False, True], [False, True])]
    singly = [{"adam": "foreach"}, {"adam": "plain"}, {"ema": "loop"}]
    if device == "cuda":
        singly.append({"data": "host"})  # on a CPU the host is the device
    return rows + [Switches(channels_last=True, **each) for each in singly]


@dataclass(frozen=True)
class Problem:
    """What is trained."""

    model: str
    width: int
    channels: int
    resolution: int
    batch: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        return self.channels, self.resolution, self.resolution

    def network(self) -> ScoreNetwork:
        """With random weights, always the same."""
        arguments: dict[str, Any] = {"channels": self.channels, "width": self.width}
        if issubclass(NETWORKS[self.model], NCSN):
            arguments["sigmas"] = sigmas().tolist()
        torch.manual_seed(0)
        return NETWORKS[self.model](**arguments)

    def flops(self) -> dict[str, float]:
        """Operations an image: of the forward pass, and of forward and backward pass together."""
        counts = {}
        with torch.device("meta"):
            network = self.network().to("meta")
            x, sigma = torch.empty(1, *self.shape), torch.empty(1)
        for name in ("forward", "step"):
            with FlopCounterMode(display=False) as counter:
                loss = denoising_score_matching(network, x, sigma, torch.zeros_like(x)).sum()
                if name == "step":
                    loss.backward()
            counts[name] = float(counter.get_total_flops())
        return counts


def sigmas() -> Tensor:
    """The noise levels of NCSNv2 on CIFAR-10."""
    return geometric_sigmas(50, 0.01, 232)


class NoEMA:
    """In the average's place while the optimizer alone is timed."""

    def update(self, model: nn.Module) -> None:
        pass


class LoopEMA(EMA):
    """The library's average, updated one tensor after the other."""

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights of `model`."""
        for mine, other in zip(self.model.parameters(), model.parameters(), strict=True):
            mine.lerp_(other, 1 - self.decay)


class Step:
    """A training step with some switches, whole or in parts.

    Args:
        problem: What is trained.
        switches: How.
        device: Where.
        state: Network, optimizer and average, which rows that have them in common share.
        data: uint8 images, on the host or on the device.
    """

    def __init__(
        self, problem: Problem, switches: Switches, device: torch.device, state: TrainState, data: Tensor
    ) -> None:
        self.problem, self.switches, self.device, self.state, self.data = problem, switches, device, state, data
        self.forward = torch.compile(state.model, dynamic=False) if switches.compile else state.model
        self.sigmas = sigmas().to(device)
        self.number = 0

    def __call__(self) -> None:
        """The whole step; nothing in it waits for the device."""
        self._use_precision()
        batch = self.batch()
        with self._autocast():
            train_step(self.state, *batch, forward=self.forward)

    def parts(self) -> dict[str, float]:
        """Seconds of each of `PARTS`."""
        self._use_precision()
        found: dict[str, float] = {}

        def timed(part: str, function: Callable[[], Any]) -> Any:
            results: list[Any] = []
            found[part] = seconds(lambda: results.append(function()), self.device)
            return results[0]

        self.state.optimizer.zero_grad()
        batch = timed("data_and_draws", self.batch)
        loss = timed("forward", lambda: self._loss(*batch))
        timed("backward", loss.sum().div(len(loss)).backward)
        ema, self.state.ema = self.state.ema, NoEMA()
        timed("optimizer", lambda: update(self.state, loss.detach()))
        self.state.ema = ema
        timed("ema", lambda: ema.update(self.state.model))
        return found

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, noise levels and noise of a batch, on the device: functions of the samples' numbers."""
        first, size = self.number * self.problem.batch, self.problem.batch
        self.number += 1
        rows = data_order(len(self.data), seed=0, first=first, count=size, device=self.data.device)
        x = self.data[rows]
        if self.device.type == "cuda" and not x.is_cuda:
            x = x.pin_memory().to(self.device, non_blocking=True)
        index = torch.arange(first, first + size, device=self.device)
        x = images.flip(images.to_float(x), random.uniform(0, random.TRAIN_FLIP, index, 0, (1,))[:, 0])
        level, z = train_draws(self.sigmas, x.shape[1:], seed=0, index=index)
        if self.switches.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, self.sigmas[level].float(), z

    def _use_precision(self) -> None:
        exact = self.switches.precision == "fp32"
        torch.set_float32_matmul_precision("highest" if exact else "high")
        torch.backends.cudnn.allow_tf32 = not exact
        torch.backends.cudnn.benchmark = True

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.switches.precision == "bf16")

    def _loss(self, x: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
        with self._autocast():
            return denoising_score_matching(self.forward, x, sigma, z)


class Ceiling:
    """The rate of a large square matmul."""

    def __init__(self, precision: str, device: torch.device, side: int) -> None:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.precision, self.device, self.side = precision, device, side
        self.a, self.b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def __call__(self, times: int = 5) -> float:
        """TFLOP/s of the fastest of some products."""
        torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
        best = min(seconds(lambda: self.a @ self.b, self.device) for _ in range(times))
        return 2 * self.side**3 / best / 1e12


def seconds(function: Callable[[], Any], device: torch.device, times: int = 1) -> float:
    """Seconds a call takes, of so many in a row."""
    synchronise(device)
    start = _clock()
    for _ in range(times):
        function()
    synchronise(device)
    return (_clock() - start) / times


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def steps_of(problem: Problem, rows: list[Switches], device: torch.device) -> dict[str, Step]:
    """A step for each row."""
    pixels = torch.randint(256, (IMAGES, *problem.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = {"host": pixels, "device": pixels.to(device)}

    @functools.cache
    def state(channels_last: bool, adam: str, ema: str) -> TrainState:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        network = problem.network().to(device).to(memory_format=layout)
        how = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {"foreach": False, "fused": False}}
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, **how[adam])
        made = TrainState(network, optimizer, ema_decay=DECAY, ema_warmup=False)
        if ema == "loop":
            made.ema = LoopEMA(network, DECAY)
        return made

    return {
        row.name: Step(problem, row, device, state(row.channels_last, row.adam, row.ema), data[row.data])
        for row in rows
    }


def measure(
    problem: Problem, rows: list[Switches], device: torch.device, *, steps: int, repeats: int
) -> dict[str, Any]:
    """The table: counted operations, ceilings, and one entry for each row.

    Args:
        problem: What is trained.
        rows: How; the baseline is added if it is missing.
        device: Where.
        steps: Timed in a row, after one of warm-up.
        repeats: Turns that each row and ceiling gets.
    """
    torch._dynamo.config.recompile_limit = 4 * len(rows)  # one network's code, compiled for each row
    rows = [BASELINE, *(row for row in rows if row != BASELINE)]
    by_name = {row.name: row for row in rows}
    run = steps_of(problem, rows, device)
    side = SQUARE[device.type]
    ceilings = {name: Ceiling(name, device, side) for name in dict.fromkeys(row.precision for row in rows)}
    first = {}
    for name, step in run.items():
        log(f"{name}: first step")
        first[name] = seconds(step, device)
        step.parts()
    times: dict[str, list[float]] = {name: [] for name in run}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in run}
    memory: dict[str, int] = {}
    rates: dict[str, list[float]] = {name: [] for name in ceilings}
    for turn in range(repeats):
        log(f"turn {turn + 1} of {repeats}")
        for name, ceiling in ceilings.items():
            rates[name].append(ceiling())
        for name, step in run.items():
            gc.collect()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            step()
            times[name].append(seconds(step, device, steps))
            if device.type == "cuda":
                memory[name] = torch.cuda.max_memory_allocated(device)
            parts[name].append(step.parts())
    flops = problem.flops()
    ceiling = {name: max(values) for name, values in rates.items()}

    def entry(name: str) -> dict[str, Any]:
        median = statistics.median(times[name])
        tflops = flops["step"] * problem.batch / median / 1e12
        ratios = [base / mine for base, mine in zip(times[BASELINE.name], times[name], strict=True)]
        return {
            "name": name,
            **asdict(by_name[name]),
            "images_per_second": problem.batch / median,
            "tflops": tflops,
            "share_of_ceiling": tflops / ceiling[by_name[name].precision],
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "parts_ms": {part: 1e3 * statistics.median(each[part] for each in parts[name]) for part in PARTS},
            "first_step_seconds": first[name],
            "peak_memory_gib": memory[name] / 2**30 if name in memory else None,
        }

    return {
        "flops_per_image": flops,
        "ceiling_tflops": ceiling,
        "ceiling_side": side,
        "rows": [entry(name) for name in run],
    }


def machine() -> dict[str, Any]:
    """What it was measured on, in words and numbers."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu}


def log(text: str) -> None:
    """Say on stderr what is being done; stdout is the JSON's."""
    print(text, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=sorted(NETWORKS), default="ncsnv2", help="default: %(default)s")
    add("--width", type=int, default=128, help="channels of the first stage (default: %(default)s)")
    add("--channels", type=int, default=3, help="of an image (default: %(default)s)")
    add("--resolution", type=int, default=32, help="of an image (default: %(default)s)")
    add("--batch", type=int, default=128 if gpu else 8, help="images a step (default: %(default)s)")
    add("--steps", type=int, default=10 if gpu else 1, help="timed in a row (default: %(default)s)")
    add("--repeats", type=int, default=5, help="turns of each row (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu", help="default: %(default)s")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: %(default)s)")
    add("--clock", choices=CLOCKS, default="wall", help="cpu: time on the processor, for a busy CPU and --threads 1")
    add("--rows", nargs="+", metavar="ROW", help="these only, and the baseline")
    add("--list", action="store_true", help="print the names of the rows and end")
    add("--compare", choices=["ray"], help="instead of the table: Ray Train beside plain DDP")
    add("--workers", type=int, default=2, help="of --compare (default: %(default)s)")
    options = parser.parse_args(arguments)
    known = {row.name: row for row in all_switches(options.device)}
    unknown = [name for name in options.rows or () if name not in known]
    if unknown:
        parser.error(f"--rows {unknown[0]}: expected one of {', '.join(known)}")
    if options.device == "cuda" and not gpu:
        parser.error("--device cuda: this torch sees no GPU")
    if options.clock == "cpu" and (options.device, options.threads) != ("cpu", 1):
        parser.error("--clock cpu: expected --device cpu --threads 1, since other threads and a GPU work beside it")
    if options.clock == "cpu" and options.compare:
        parser.error("--clock cpu: expected no --compare, whose processes wait for each other")
    for name in ("batch", "steps", "repeats", "threads", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected at least 1")
    options.switches = [known[name] for name in options.rows or known]
    return options


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.list:
        print("\n".join(row.name for row in options.switches))
        return
    torch.set_num_threads(options.threads)
    global _clock
    _clock = CLOCKS[options.clock]
    problem = Problem(options.model, options.width, options.channels, options.resolution, options.batch)
    report: dict[str, Any] = {
        "machine": machine(),
        "torch": torch.__version__,
        "device": options.device,
        "threads": options.threads,
        "clock": options.clock,
        "problem": asdict(problem) | {"parameters": sum(each.numel() for each in problem.network().parameters())},
        "steps": options.steps,
        "repeats": options.repeats,
    }
    count = {"steps": options.steps, "repeats": options.repeats}
    if options.compare:
        from benchmarks import beside_ddp

        with contextlib.redirect_stdout(sys.stderr):  # what Ray tells
            report |= beside_ddp.measure(problem, options.device, workers=options.workers, **count)
    else:
        report |= measure(problem, options.switches, torch.device(options.device), **count)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
