"""Compare schedules of noise levels: geometric, linear, and geometric with steps of a fixed signal-to-noise ratio.

For each of ablation.seeds and each spacing a network of ablation.model is trained for ablation.steps steps, all between
the sigma_1 and sigma_L and with the L of the section `noise`; that of the geometric levels is drawn from with both step
rules, which change no training. Each row may choose its step size, of ablation.snr, by the mean FID of ablation.n
images over the seeds: r is the signal-to-noise ratio of each step, and epsilon = 2 (r sigma_L)^2 is the same size for a
score of -z / sigma. Reads out/data and out/features; writes out/ablation: ablation.txt, ablation.json, curves.png and
grids.png. Trials run in runs/ablation-..., where the same command goes on after a crash.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from torch import Tensor

from ncsn import images, random, samplers
from ncsn.losses import denoising_score_matching
from ncsn.noise import epsilon_rule, geometric_sigmas, linear_sigmas, snr_rule
from ncsn.training import train_draws
from pipeline import _extractors, _params, _ray, _shards, _stage, _sweep, _track, _trial, frontier, prepare, sample
from pipeline import schedule as schedules
from pipeline._pictures import STYLE
from pipeline._sampler import Drawer, Sampler
from pipeline._stage import StageError
from pipeline._store import read_json, replacing_folder, write_json, write_text

OUT = Path("out/ablation")
SECTIONS = ("data", "features", "loss", "noise", "train", "sample", "evaluate", "ablation")
CODE = (
    *("ablation", "_extractors", "_reference", "_sampler", "_shards", "_sweep", "_trial"),
    *("evaluate", "frontier", "sample", "schedule", "select", "train"),
)
ROWS = {"geometric": ("geometric", False), "linear": ("linear", False), "geometric, SNR": ("geometric", True)}
USERS = {"geometric": 231.21, "linear": 477.47, "geometric, SNR": 230.75}  # their U-Net on CIFAR-10, Inception features
SHOWN = 36  # images of a row
WATCHED = 32  # images whose updates are measured
LOSS_IMAGES = 500  # test images for the loss of each level


def main(params: _params.Params, *, trial: bool = False) -> None:
    extractor = _sweep.extractor(params)
    if trial:
        attempt(params, extractor)
        return
    p, base = params.ablation, of_trial(params)
    axes: dict[str, tuple[Any, ...]] = {"noise.spacing": ("geometric", "linear"), "train.seed": p.seeds}
    search = dataclasses.replace(params.tune, search="grid", scheduler="none", steps=p.steps)
    with (
        _sweep.trials("ablation", params, base, SECTIONS, CODE, extractor, 2 * len(p.seeds)) as sweep,
        replacing_folder(OUT) as out,
    ):
        found = _ray.sweep(partial(_trial.run, sweep.plan), axes, search, params.runtime, sweep.folder, p.steps)
        trials = finished(found, sweep.folder)
        rows = [row(name, trials) for name in ROWS]
        publish(rows, trials, base, out)
        sweep.run.artifact(out, "ablation")
        sweep.run.metrics({f"fid/{each['name'].replace(', ', '_')}": each["mean"] for each in rows})
    print(Path(OUT, "ablation.txt").read_text(), end="")


def of_trial(params: _params.Params) -> _params.Params:
    """The parameters of each trial: levels that need nothing computed, so that linear ones may have as many."""
    geometric = dataclasses.replace(params.noise, spacing="geometric", sde="none")
    levels = schedules.of_data(geometric, params.train.space)
    given = {key: levels[key] for key in ("sigma_1", "L", "epsilon")}
    base = dataclasses.replace(
        params, model=params.ablation.model, noise=dataclasses.replace(geometric, **given, epsilon_scale=1.0)
    )
    return _sweep.shortened(base, params.ablation.steps, params.ablation.n)


def attempt(params: _params.Params, extractor: _extractors.Extractor) -> None:
    """One trial, in its folder."""

    def measure(run: _track.Run) -> dict[str, Any]:
        base, weights, n = sample.make_sampler(params, "ema"), sample.weights("ema"), params.ablation.n
        rows = _sweep.drawn([(ways(base, params.ablation.snr), weights)], n, params, extractor)
        drawer = Drawer.of(base, weights, params.runtime)
        for k, each in enumerate(rows):
            if each["fid"] is not None:
                each["ratios"] = ratios(Drawer(each["order"].sampler, drawer.model))
                np.save(f"images_{k}.npy", _shards.load(each["order"], params.runtime)[:SHOWN])
        losses = level_losses(drawer, params.train.seed)
        run.history([(k, {"level_loss": loss}) for k, loss in enumerate(losses)])
        return _sweep.told(rows, base, n, params, extractor, run) | {"losses": losses}

    _sweep.attempt(params, measure)


def ways(base: Sampler, ratios: Sequence[float]) -> list[Sampler]:
    """Annealed Langevin dynamics with steps of each signal-to-noise ratio by epsilon, for geometric levels also by the
    ratio itself."""
    T, sigma_L = base.schedule["steps_per_level"], base.schedule["sigmas"][-1]
    found = [frontier.variant(base, T=T, epsilon=2 * (r * sigma_L) ** 2, denoise=base.denoise) for r in ratios]
    if base.schedule["spacing"] == "geometric":
        found += [frontier.variant(base, T=T, snr=r, denoise=base.denoise) for r in ratios]
    return found


@torch.no_grad()
def ratios(drawer: Drawer) -> list[float]:
    """The signal-to-noise ratio of the updates, ||alpha s|| / ||sqrt(2 alpha) z||, of each level: its mean over steps
    and `WATCHED` images."""
    sampler, device = drawer.sampler, drawer.device
    levels = sampler.schedule["sigmas"]
    rule = snr_rule(sampler.snr) if sampler.snr else epsilon_rule(sampler.schedule["epsilon"], levels[-1])
    seen: dict[float, list[Tensor]] = {sigma: [] for sigma in levels}

    def watched(sigma: float, s: Tensor, z: Tensor) -> float | Tensor:
        alpha = rule(sigma, s, z)
        norms = s.flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1)
        seen[sigma].append(((torch.as_tensor(alpha, device=device).flatten() / 2).sqrt() * norms).mean())
        return alpha

    index = torch.arange(WATCHED, device=device)
    noise = random.seeded_noise(sampler.seed, index)
    samplers.annealed_langevin(
        drawer.model.score,
        drawer.start(index, noise),
        torch.tensor(levels, dtype=torch.float64),
        steps_per_level=sampler.schedule["steps_per_level"],
        denoise=False,
        step_rule=watched,
        noise=noise,
    )
    return [float(torch.stack(values).mean()) for values in seen.values()]


@torch.no_grad()
def level_losses(drawer: Drawer, seed: int) -> list[float]:
    """The denoising loss of each level on test images, over D / 2, that of a score which is zero."""
    test = np.array(prepare.load("test")[0][:LOSS_IMAGES])
    x = drawer.to_space(images.to_float(torch.from_numpy(test).to(drawer.device)))
    levels = torch.tensor(drawer.sampler.schedule["sigmas"], dtype=torch.float64, device=drawer.device)
    found = []
    for k, sigma in enumerate(levels.tolist()):
        index = k * len(x) + torch.arange(len(x), device=drawer.device)
        _, z = train_draws(levels, x.shape[1:], seed=seed, index=index)
        told = torch.full((len(x),), sigma, device=drawer.device)
        losses = [
            denoising_score_matching(drawer.model.score, *part)
            for part in zip(x.split(100), told.split(100), z.split(100), strict=True)
        ]
        found.append(2 * float(torch.cat(losses).double().mean()) / x[0].numel())
    return found


def finished(found: list[_ray.Trial], folder: Path) -> list[dict[str, Any]]:
    """What the trials have kept, with their names and seeds; raises StageError if one failed: rows would be unlike."""
    for each in found:
        if each.error is not None:
            raise StageError(f"trial {each.name} with {each.setting} failed: {each.error}; see {folder / each.name}")
    trials = [read_json(folder / each.name / _trial.DONE) for each in found]
    return [
        told | {"seed": each.setting["train.seed"], "folder": str(folder / each.name), "chosen": each.setting}
        for told, each in zip(trials, found, strict=True)
    ]


def row(name: str, trials: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table: the FIDs of each step size, a seed each, and the step size with the lowest mean.

    Raises:
        StageError: If no step size drew images with all seeds.
    """
    spacing, by_ratio = ROWS[name]
    own = sorted((each for each in trials if each["setting"]["spacing"] == spacing), key=lambda each: each["seed"])
    sizes: dict[float, list[dict[str, Any]]] = {}
    for each in own:
        for way in each["rows"]:
            if (way["snr"] is not None) == by_ratio and way["fid"] is not None:
                sizes.setdefault(size(way, each["setting"]["sigma_L"]), []).append(way)
    whole = {r: [way["fid"] for way in some] for r, some in sizes.items() if len(some) == len(own)}
    if not whole:
        raise StageError(f"{name}: no step size of ablation.snr drew images with all seeds: try smaller ones")
    ladder = geometric_sigmas if spacing == "geometric" else linear_sigmas
    r = min(whole, key=lambda each: float(np.mean(whole[each])))
    return {
        "name": name,
        "r": r,
        "epsilon": None if by_ratio else sizes[r][0]["epsilon"],
        "nfe": sizes[r][0]["nfe"],
        "sigmas": ladder(*(own[0]["setting"][key] for key in _sweep.AXES)).tolist(),
        "seeds": [each["seed"] for each in own],
        "fid": whole[r],
        "mean": float(np.mean(whole[r])),
        "std": float(np.std(whole[r], ddof=1)) if len(own) > 1 else None,
        "by_size": sorted([size, fids] for size, fids in whole.items()),
        "ratios": np.mean([way["ratios"] for way in sizes[r]], axis=0).tolist(),
        "losses": [each["losses"] for each in own],
        "users": USERS[name],
    }


def size(way: dict[str, Any], sigma_L: float) -> float:
    """r of a step by either rule, to six digits."""
    return float(f"{way['snr'] or math.sqrt(way['epsilon'] / 2) / sigma_L:.6g}")


def publish(rows: list[dict[str, Any]], trials: list[dict[str, Any]], base: _params.Params, out: Path) -> None:
    """Write all that out/ablation has."""
    steps, n, T = base.train.steps, base.ablation.n, base.noise.steps_per_level
    levels = {**{key: trials[0]["setting"][key] for key in _sweep.AXES}, "T": T}
    measured = {key: trials[0][key] for key in ("metric", "n", "extractor", "reference") if key in trials[0]}
    write_json(out / "ablation.json", {**measured, "steps": steps, "levels": levels, "rows": rows, "trials": trials})
    told = f"{levels['L']} levels from {levels['sigma_1']:.4g} to {levels['sigma_L']:.4g}, T = {levels['T']}, "
    told += f"{base.model.name}, {steps} steps of {base.train.batch_size}, data {base.data.name}, n = {n}, features: "
    told += str(measured["extractor"]["name"])
    write_text(out / "ablation.txt", f"{table(rows)}\n\n{verdict(rows)}\n\n{told}\n")
    plot_curves(rows, out / "curves.png")
    plot_grids(rows, trials, out / "grids.png")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, beside what the users had."""
    seeds = len(rows[0]["seeds"])
    lines = [f"{'schedule':<16}{'step size':<32}{'NFE':>5}  {f'FID, {seeds} seeds':<18}{'users, CIFAR-10':>16}"]
    for each in rows:
        step = f"r = {each['r']:.3g}" + (f" (epsilon = {each['epsilon']:.3g})" if each["epsilon"] else "")
        fid = _sweep.spread(each["mean"], each["std"])
        lines.append(f"{each['name']:<16}{step:<32}{each['nfe']:>5}  {fid:<18}{each['users']:>16.2f}")
    return "\n".join(lines)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Of each other row against the geometric one: the ratio of mean FIDs, and with how many seeds it is worse."""
    first, *others = rows
    lines = []
    for each in others:
        worse = sum(a > b for a, b in zip(each["fid"], first["fid"], strict=True))
        lines.append(
            f"{each['name']}: {each['mean'] / first['mean']:.3g} times the FID of {first['name']}, "
            f"worse with {worse} of {len(first['fid'])} seeds (users: {each['users'] / first['users']:.3g} times)"
        )
    return "\n".join(lines)


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the levels, the FID against the step size, the loss of each level, and the ratio of its updates."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 6.8), layout="constrained")
        levels, sizes, losses, ratios = figure.subplots(2, 2).flat
        for k, each in enumerate(rows):
            _, by_ratio = ROWS[each["name"]]
            sigmas, look = each["sigmas"], {"color": f"C{k}", "label": each["name"], "ls": "--" if by_ratio else "-"}
            values = np.array([fids for _, fids in each["by_size"]])
            at = [r for r, _ in each["by_size"]]
            sizes.plot(at, values, ".", ms=4, color=f"C{k}")
            sizes.plot(at, values.mean(1), **look)
            ratios.plot(sigmas, each["ratios"], **{**look, "label": f"{each['name']}, r = {each['r']:.3g}"})
            if by_ratio:
                continue
            levels.plot(range(1, len(sigmas) + 1), sigmas, "o-", ms=3, color=f"C{k}", label=each["name"])
            of_seeds = np.array(each["losses"])
            losses.plot(sigmas, of_seeds.mean(0), "o-", ms=3, color=f"C{k}", label=each["name"])
            losses.fill_between(sigmas, of_seeds.min(0), of_seeds.max(0), color=f"C{k}", alpha=0.2, lw=0)
        levels.set(yscale="log", xlabel="level i", ylabel=r"$\sigma_i$", title="the schedules")
        sizes.set(xscale="log", yscale="log", xlabel="step size r", ylabel="FID", title="dots: each seed")
        losses.set(xscale="log", yscale="log", xlabel=r"$\sigma$", ylabel="loss / (D / 2)", title="loss on test images")
        ratios.set(xscale="log", xlabel=r"$\sigma$", ylabel=r"$\|\alpha s\| / \|\sqrt{2 \alpha} z\|$")
        ratios.set(title="signal to noise of the updates")
        levels.xaxis.set_major_locator(MaxNLocator(integer=True))
        sizes.set_xticks(at, [f"{r:g}" for r in at])
        for axes in (levels, sizes, losses, ratios):
            axes.legend(fontsize=8)
            if axes is not sizes:
                axes.xaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_major_formatter("{x:g}")
        sizes.xaxis.set_minor_locator(NullLocator())
        sizes.yaxis.set_minor_formatter("{x:g}")
        figure.savefig(path, dpi=130)


def plot_grids(rows: list[dict[str, Any]], trials: list[dict[str, Any]], path: Path) -> None:
    """Draw images of each row, of its first seed."""
    files = []
    for each in rows:
        spacing, by_ratio = ROWS[each["name"]]
        own = next(t for t in trials if (t["setting"]["spacing"], t["seed"]) == (spacing, each["seeds"][0]))
        k = next(
            k
            for k, way in enumerate(own["rows"])
            if (way["snr"] is not None) == by_ratio and size(way, own["setting"]["sigma_L"]) == each["r"]
        )
        files.append(Path(own["folder"], f"images_{k}.npy"))
    _sweep.plot_grids(rows, files, len(rows), path)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trial", action="store_true", help=argparse.SUPPRESS)


if __name__ == "__main__":
    from pipeline import ablation as this  # since what is defined in __main__ would travel to the workers by value

    _stage.run("ablation", __doc__, this.main, _options)
