"""Measure a sampling step: network evaluations/s, images/s, TFLOP/s and the shares of noise and update, as JSON.

Torch and numpy suffice. A row is one way to evaluate the network: "plain" is the baseline (fp32, NCHW, eager), the
others are `ncsn.inference.Evaluator`, channels_last, with the switches in their name. All rows take turns, `--repeats`
times, and each number is a median, so that a neighbour's load hits all alike. What is timed is
`ncsn.samplers.langevin` with the noise of `ncsn.random`, as the stage `sample` draws. TFLOP/s come from counted
operations (convolutions and matrix products), their share from the best rate of a large square matmul in the row's
precision. The parts are timed one by one, each waited for; the noise beside torch.randn, which depends on the batch.

  python benchmarks/sample_step.py --batch 256               NCSNv2 for CIFAR-10
  python benchmarks/sample_step.py --rows fp32 bf16_compile  these rows only; --list names all
  python benchmarks/sample_step.py --workers 2               the pool of Ray's workers, 1 beside 2; needs all of ours
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where ncsn is, which need not be installed

from benchmarks import train_step
from benchmarks.train_step import CLOCKS, SQUARE, Ceiling, Problem, log, machine, seconds
from ncsn import random
from ncsn.inference import Evaluator
from ncsn.networks import NETWORKS
from ncsn.samplers import langevin

SIGMA, EPSILON = 0.1, 1e-6
NFE = 232 * 5 + 1  # of NCSNv2 on CIFAR-10
PARTS = ("network", "noise", "update", "randn")


@dataclasses.dataclass(frozen=True)
class Switches:
    """How the network is evaluated; the defaults are the baseline.

    Args:
        plain: Called as it is, in NCHW.
        precision: "fp32", "tf32" (GPUs alone) or "bf16".
        compile: By torch.compile.
        graph: All kernels of an evaluation launched at once, as a CUDA graph.
    """

    plain: bool = True
    precision: str = "fp32"
    compile: bool = False
    graph: bool = False

    @property
    def name(self) -> str:
        """The precision and what is on."""
        on = [name for name in ("compile", "graph") if getattr(self, name)]
        return "plain" if self.plain else "_".join([self.precision, *on])


BASELINE = Switches()


def all_switches(device: str) -> list[Switches]:
    """The rows: the baseline, then precision by compilation, on a GPU by graph too."""
    cuda = device == "cuda"
    precisions = ["fp32", "tf32", "bf16"] if cuda else ["fp32", "bf16"]
    return [BASELINE, *(Switches(False, *each) for each in itertools.product(precisions, [False, True], {False, cuda}))]


class Step:
    """Sampling steps with some switches.

    Args:
        problem: What is drawn.
        switches: How.
        device: Where.
    """

    def __init__(self, problem: Problem, switches: Switches, device: torch.device) -> None:
        self.switches, self.device = switches, device
        network = problem.network().to(device).eval()
        self.index = torch.arange(problem.batch, device=device)
        self.x = random.start_images(0, self.index, problem.shape)
        self.noise = random.seeded_noise(0, self.index)
        self.score: Callable[[Tensor, Tensor], Tensor] = network
        if not switches.plain:
            self.score = Evaluator(
                network, precision=switches.precision, compile=switches.compile, cuda_graph=switches.graph
            )

    def __call__(self, steps: int = 1) -> None:
        """So many, from where the last call ended; nothing waits for the device."""
        self._use_precision()
        self.x = langevin(self.score, self.x, epsilon=EPSILON, steps=steps, sigma=SIGMA, noise=self.noise)

    @torch.no_grad()
    def parts(self, times: int = 3) -> dict[str, float]:
        """Seconds of each of `PARTS`."""
        self._use_precision()
        x, sigma = self.x, torch.full((len(self.x),), SIGMA, device=self.device)
        s, z = x.clone(), x.clone()
        update = {"epsilon": EPSILON, "steps": times, "sigma": SIGMA, "noise": lambda x, step: z}
        return {
            "network": seconds(lambda: self.score(x, sigma), self.device, times),
            "noise": seconds(lambda: self.noise(x, 0), self.device, times),
            "update": seconds(lambda: langevin(lambda x, sigma: s, x, **update), self.device) / times,
            "randn": seconds(lambda: torch.randn_like(x), self.device, times),
        }

    def _use_precision(self) -> None:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True


def measure(
    problem: Problem, rows: list[Switches], device: torch.device, *, steps: int, repeats: int, nfe: int
) -> dict[str, Any]:
    """The table: counted operations, ceilings, and one entry for each row.

    Args:
        problem: What is drawn.
        rows: How; the baseline is added if it is missing.
        device: Where.
        steps: Timed in a row, after one of warm-up.
        repeats: Turns that each row and ceiling gets.
        nfe: Network evaluations an image, for images/s.
    """
    torch._dynamo.config.recompile_limit = 4 * len(rows)
    rows = [BASELINE, *(row for row in rows if row != BASELINE)]
    run = {row.name: Step(problem, row, device) for row in rows}
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
            times[name].append(seconds(lambda step=step: step(steps), device) / steps)  # type: ignore[misc]
            if device.type == "cuda":
                memory[name] = torch.cuda.max_memory_allocated(device)
            parts[name].append(step.parts())
    flops = problem.flops()["forward"]
    ceiling = {name: max(values) for name, values in rates.items()}

    def entry(row: Switches) -> dict[str, Any]:
        name = row.name
        rate = problem.batch / statistics.median(times[name])
        ratios = [base / mine for base, mine in zip(times[BASELINE.name], times[name], strict=True)]
        part = {each: statistics.median(found[each] for found in parts[name]) for each in PARTS}
        step = sum(part[each] for each in ("network", "noise", "update"))
        return {
            "name": name,
            **dataclasses.asdict(row),
            "evaluations_per_second": rate,
            "images_per_second": rate / nfe,
            "tflops": flops * rate / 1e12,
            "share_of_ceiling": flops * rate / 1e12 / ceiling[row.precision],
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "parts_ms": {each: 1e3 * value for each, value in part.items()},
            "noise_share": part["noise"] / step,
            "update_share": part["update"] / step,
            "first_step_seconds": first[name],
            "peak_memory_gib": memory[name] / 2**30 if name in memory else None,
        }

    return {
        "nfe": nfe,
        "flops_per_evaluation": flops,
        "ceiling_tflops": ceiling,
        "ceiling_side": side,
        "rows": [entry(row) for row in rows],
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=sorted(NETWORKS), default="ncsnv2", help="default: %(default)s")
    add("--width", type=int, default=128, help="channels of the first stage (default: %(default)s)")
    add("--channels", type=int, default=3, help="of an image (default: %(default)s)")
    add("--resolution", type=int, default=32, help="of an image (default: %(default)s)")
    add("--batch", type=int, default=256 if gpu else 8, help="images at once (default: %(default)s)")
    add("--steps", type=int, default=10 if gpu else 1, help="timed in a row (default: %(default)s)")
    add("--repeats", type=int, default=5, help="turns of each row (default: %(default)s)")
    add("--nfe", type=int, default=NFE, help="evaluations an image, for images/s (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu", help="default: %(default)s")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: %(default)s)")
    add("--clock", choices=CLOCKS, default="wall", help="cpu: time on the processor, for a busy CPU and --threads 1")
    add("--rows", nargs="+", metavar="ROW", help="these only, and the baseline")
    add("--list", action="store_true", help="print the names of the rows and end")
    add("--workers", type=int, help="instead of the table: a pool of 1 worker beside one of so many")
    options = parser.parse_args(arguments)
    known = {row.name: row for row in all_switches(options.device)}
    unknown = [name for name in options.rows or () if name not in known]
    if unknown:
        parser.error(f"--rows {unknown[0]}: expected one of {', '.join(known)}")
    if options.device == "cuda" and not gpu:
        parser.error("--device cuda: this torch sees no GPU")
    if options.clock == "cpu" and (options.device, options.threads) != ("cpu", 1):
        parser.error("--clock cpu: expected --device cpu --threads 1, since other threads and a GPU work beside it")
    if options.clock == "cpu" and options.workers:
        parser.error("--clock cpu: expected no --workers, which are processes of their own")
    for name in ("batch", "steps", "repeats", "threads", "nfe"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected at least 1")
    if options.workers is not None and options.workers < 2:
        parser.error(f"--workers {options.workers}: expected at least 2, which 1 is measured beside")
    options.switches = [known[name] for name in options.rows or known]
    return options


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.list:
        print("\n".join(row.name for row in options.switches))
        return
    torch.set_num_threads(options.threads)
    train_step._clock = CLOCKS[options.clock]
    problem = Problem(options.model, options.width, options.channels, options.resolution, options.batch)
    report: dict[str, Any] = {
        "machine": machine(),
        "torch": torch.__version__,
        "device": options.device,
        "threads": options.threads,
        "clock": options.clock,
        "problem": dataclasses.asdict(problem)
        | {"parameters": sum(each.numel() for each in problem.network().parameters())},
        "steps": options.steps,
        "repeats": options.repeats,
    }
    if options.workers:
        from benchmarks import pool_scaling

        with contextlib.redirect_stdout(sys.stderr):  # what Ray tells
            report |= pool_scaling.measure(
                problem, workers=options.workers, steps=options.steps, repeats=options.repeats
            )
    else:
        report |= measure(
            problem,
            options.switches,
            torch.device(options.device),
            steps=options.steps,
            repeats=options.repeats,
            nfe=options.nfe,
        )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
