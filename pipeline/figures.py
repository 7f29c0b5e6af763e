"""Draw the first three figures of Song & Ermon (2019), arXiv:1907.05600, each with what was measured for it.

figure_1  sliced score matching of images: without noise it does not converge, with a little it does
figure_2  the score of a mixture of two Gaussians and the one that an MLP learned: they agree where there is data
figure_3  samples of that mixture: exact, by Langevin dynamics, by annealed Langevin dynamics, with exact scores

Reads nothing but the photographs inside scikit-learn; writes out/figures: a PNG for each, the curves of Figure 1,
and figures.json. The settings are the defaults of the functions below, and the paper's but for Figure 1, which has
there CIFAR-10, a wider network, batches of 128 and 50,000 steps.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from torch import Tensor, nn
from tqdm import tqdm

from ncsn import images, noise, random, samplers
from ncsn.losses import sliced_score_matching
from ncsn.networks import MLP, ResScore
from ncsn.optim import Adam
from ncsn.toy import Mixture
from ncsn.training import data_order
from pipeline import _params, _stage
from pipeline._pictures import STYLE
from pipeline._stage import StageError, log
from pipeline._store import replacing_folder, write_json

OUT = Path("out/figures")
WEIGHTS, MEANS = torch.tensor([0.8, 0.2]), torch.tensor([[5.0, 5.0], [-5.0, -5.0]])
MIXTURE = Mixture(WEIGHTS, MEANS, 1.0)
HALF = 8  # the toy figures show [-8, 8]^2
PROJECTION = 1  # number of the draw that projections are; 0 is the noise


def main(params: _params.Params) -> None:
    torch.set_num_threads(1)  # these networks are too small for more
    with replacing_folder(OUT) as out:
        record = {
            "figure_1": figure_1(out / "figure_1.png"),
            "figure_2": figure_2(out / "figure_2.png"),
            "figure_3": figure_3(out / "figure_3.png"),
        }
        write_json(out / "figures.json", record)
    for name, each in record.items():
        log.info("%s: %s", name, each["measured"])


def figure_1(
    path: Path, *, steps: int = 3000, batch_size: int = 64, side: int = 8, width: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Loss curves of sliced score matching of images, without noise and with N(0, 1e-4) added.

    Pixels are in [-1, 1], so the noise has the standard deviation 0.01 of the paper. Measured are, over the last
    quarter, the median and the interquartile range relative to it; and the setback: the largest share of the best
    window so far (a fiftieth of the steps) that a later window has lost again.
    """
    x, learning_rate, stds = tiles(side), 1e-3, {"without_noise": 0.0, "with_noise": 0.01}

    def train(std: float) -> np.ndarray:
        def draw(index: Tensor) -> Tensor:
            batch = x[data_order(len(x), seed=seed, first=int(index[0]), count=len(index))]
            return batch + std * random.normal(seed, random.TRAIN_NOISE, index, 0, batch.shape[1:])

        return fit(
            networks[std],
            draw,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            what=f"figure 1, noise {std:g}",
        )

    networks = {}
    for std in stds.values():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            networks[std] = ResScore(channels=x.shape[1], width=width, rescale=False)
    with ThreadPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        curves = dict(zip(stds, pool.map(train, stds.values()), strict=True))
    table = np.column_stack([np.arange(1, steps + 1), *curves.values()])
    header = ",".join(["step", *curves])
    np.savetxt(path.with_suffix(".csv"), table, fmt="%.6g", delimiter=",", header=header, comments="")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        both, titles = figure.subplots(1, 2), ("without noise", "with noise N(0, 1e-4)")
        for axes, curve, title in zip(both, curves.values(), titles, strict=True):
            axes.plot(np.arange(1, steps + 1), curve, lw=0.6)
            axes.set(xlabel="step", title=title)
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        both[0].set_ylabel("sliced score matching loss")
        figure.savefig(path, dpi=120)
    return {
        "settings": {
            "data": f"scikit-learn's two photographs in {len(x):,} tiles of 3x{side}x{side}, pixels in [-1, 1]",
            "network": {"name": "resscore", "width": width},
            "objective": "SSM-VR, one standard normal projection",
            "optimiser": "Adam",
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "steps": steps,
            "noise_std": stds,
            "seed": seed,
        },
        "measured": {name: steadiness(curve) for name, curve in curves.items()},
    }


def figure_2(path: Path, *, steps: int = 10_000, batch_size: int = 128, seed: int = 0) -> dict[str, Any]:
    """The score of the mixture, the score that an MLP learned of its samples, and how far they differ where.

    The error is ||s_theta - s||, the relative one that over ||s||. Dense is the smallest region that holds 99 % of the
    mass on a grid of 161 x 161 points, sparse the rest of the grid.
    """
    learning_rate = 1e-3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MLP()
    losses = fit(
        network,
        lambda index: mixture_samples(seed, index),
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        what="figure 2",
    )

    def scores(points: Tensor) -> tuple[Tensor, Tensor]:
        zero = points.new_zeros(len(points))
        with torch.no_grad():
            return MIXTURE.score(points, zero), network(points, zero)

    fine = square(161)
    density = MIXTURE.log_prob(fine, fine.new_zeros(len(fine))).exp()
    exact, learned = scores(fine)
    error = (learned - exact).norm(dim=1)
    relative = error / exact.norm(dim=1)
    cosine = nn.functional.cosine_similarity(learned, exact)
    dense = densest(density, 0.99)

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 3.7), layout="constrained")
        data, model, difference = figure.subplots(1, 3)
        coarse = square(20)
        for axes, score, title in zip(
            (data, model), scores(coarse), ("data score $s$", r"learned score $s_\theta$"), strict=True
        ):
            shade(axes, density)
            axes.quiver(*coarse.T.numpy(), *score.T.numpy(), color="0.15", scale=220, width=0.0035, pivot="tail")
            axes.set_title(title)
        shown = difference.imshow(
            as_map(error), origin="lower", extent=(-HALF, HALF, -HALF, HALF), cmap="Blues", norm=LogNorm(0.03, 10)
        )
        axis = np.linspace(-HALF, HALF, 161)
        difference.contour(axis, axis, as_map(dense.float()), levels=[0.5], colors="C1", linewidths=1.2)
        difference.set_title("error, and where 99 % of the mass is")
        figure.colorbar(shown, ax=difference, extend="both", label=r"$\|s_\theta - s\|$")
        for axes in (data, model, difference):
            frame(axes)
        figure.savefig(path, dpi=120)
    regions = {"dense": dense, "sparse": ~dense}
    return {
        "settings": {
            "data": "0.8 N((5, 5), I) + 0.2 N((-5, -5), I), fresh samples",
            "network": {"name": "mlp", "layers": [2, 128, 128, 2], "activation": "softplus"},
            "objective": "SSM-VR, one standard normal projection",
            "optimiser": "Adam",
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "steps": steps,
            "seed": seed,
            "grid": "161 x 161 on [-8, 8]^2; dense holds 99 % of the mass",
        },
        "measured": {
            "last_loss": float(np.mean(losses[-100:])),
            **{
                name: {
                    "share_of_square": float(where.float().mean()),
                    "median_error": float(error[where].median()),
                    "median_relative_error": float(relative[where].median()),
                    "mean_cosine": float(cosine[where].mean()),
                }
                for name, where in regions.items()
            },
        },
    }


def figure_3(path: Path, *, n: int = 1280, seed: int = 0) -> dict[str, Any]:
    """Samples of the mixture in three ways, and the share of each in the mode of weight 0.8.

    The papers' step sizes are twice the epsilon here (see `samplers.langevin`): 0.1. The annealed chains follow the
    mixture whose components have the standard deviation sigma itself, as in the official code.
    """
    index, epsilon, steps, T = torch.arange(n), 0.05, 1000, 100
    sigmas = noise.geometric_sigmas(20, 1, 10)
    start = 2 * HALF * random.start_images(seed, index, (2,)) - HALF
    drawn = {"exact": mixture_samples(seed, index)}
    with tqdm(total=steps + len(sigmas) * T, unit="step", desc="figure 3", mininterval=1) as bar:

        def observe(x: Tensor, step: int, sigma: float) -> None:
            bar.update()

        seeded = random.seeded_noise(seed, index)
        drawn["langevin"] = samplers.langevin(
            MIXTURE.score, start, epsilon=epsilon, steps=steps, sigma=0.0, noise=seeded, observe=observe
        )
        drawn["annealed"] = samplers.annealed_langevin(
            Mixture(WEIGHTS, MEANS, 0.0).score,
            start,
            sigmas,
            epsilon=epsilon,
            steps_per_level=T,
            denoise=False,
            noise=seeded,
            observe=observe,
        )
    share = {name: float((x.sum(1) > 0).float().mean()) for name, x in drawn.items()}
    titles = {"exact": "exact samples", "langevin": "Langevin dynamics", "annealed": "annealed Langevin dynamics"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        for axes, (name, x) in zip(figure.subplots(1, 3), drawn.items(), strict=True):
            for where, colour in ((x.sum(1) > 0, "C0"), (x.sum(1) <= 0, "C1")):
                axes.plot(*x[where].T.numpy(), "o", ms=2, alpha=0.5, mew=0, color=colour)
            axes.set_title(f"{titles[name]}\n{share[name]:.1%} in the upper mode")
            frame(axes)
        figure.savefig(path, dpi=120)
    return {
        "settings": {
            "data": "0.8 N((5, 5), I) + 0.2 N((-5, -5), I), exact scores",
            "n": n,
            "start": "uniform on [-8, 8]^2",
            "langevin": {"epsilon": epsilon, "steps": steps},
            "annealed": {"sigma_1": 20, "sigma_L": 1, "L": len(sigmas), "steps_per_level": T, "epsilon": epsilon},
            "seed": seed,
        },
        "measured": {"share_in_upper_mode": share},
    }


def fit(
    network: nn.Module,
    draw: Callable[[Tensor], Tensor],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    what: str,
) -> np.ndarray:
    """Train by sliced score matching (SSM-VR, one projection) with Adam; the loss of each step.

    Args:
        network: The score; it must ignore sigma.
        draw: The training data with these numbers, (B,) -> (B, ...).
        steps: Of the optimiser.
        batch_size: Of each step.
        learning_rate: Of Adam.
        seed: Of the projections.
        what: Names it in the progress bar and in errors.

    Raises:
        StageError: If a loss is not finite.
    """
    optimizer = Adam(network.parameters(), lr=learning_rate)
    losses = np.empty(steps)
    for step in tqdm(range(steps), unit="step", desc=what, mininterval=1):
        index = torch.arange(step * batch_size, (step + 1) * batch_size)
        x = draw(index)
        v = random.normal(seed, random.TRAIN_NOISE, index, PROJECTION, x.shape[1:])
        loss = sliced_score_matching(network, x, x.new_zeros(len(x)), v).mean()
        losses[step] = loss.item()
        if not np.isfinite(losses[step]):
            raise StageError(f"{what}: the loss is {losses[step]} at step {step + 1}: lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def tiles(side: int) -> Tensor:
    """The two photographs of scikit-learn cut into squares, pixels in [-1, 1], shape (N, 3, side, side)."""
    from sklearn.datasets import load_sample_images

    photographs = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    cut = photographs.unfold(2, side, side).unfold(3, side, side)  # (2, 3, rows, columns, side, side)
    return images.centre(images.to_float(cut.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)))


def steadiness(curve: np.ndarray) -> dict[str, float]:
    """Where a loss curve ends and how steadily it got there; see `figure_1`."""
    last = curve[-max(1, len(curve) // 4) :]
    low, median, high = (float(value) for value in np.percentile(last, (25, 50, 75)))
    windows = np.array([np.median(part) for part in np.array_split(curve, min(50, len(curve)))])
    best = np.minimum.accumulate(windows)
    setback = float(np.max((windows - best)[best < 0] / -best[best < 0], initial=0))
    return {"median": median, "relative_interquartile_range": (high - low) / abs(median), "setback": setback}


def mixture_samples(seed: int, index: Tensor) -> Tensor:
    """Exact samples of the mixture with these numbers, shape (B, 2)."""
    u = random.uniform(seed, random.TRAIN_LEVEL, index, 0, (1,))[:, 0]
    return MIXTURE.sample(u, random.normal(seed, random.TRAIN_NOISE, index, 0, (2,)))


def square(side: int) -> Tensor:
    """A grid of side^2 points over [-8, 8]^2, row by row from below, shape (side^2, 2)."""
    axis = torch.linspace(-HALF, HALF, side)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def densest(density: Tensor, mass: float) -> Tensor:
    """Which points of a grid are in the smallest region that holds this share of the mass on it, bool, shape (N,)."""
    ordered, order = density.sort(descending=True)
    count = int((ordered.cumsum(0) < mass * ordered.sum()).sum()) + 1
    return torch.zeros(len(density), dtype=torch.bool).index_fill(0, order[:count], True)


def as_map(values: Tensor) -> np.ndarray:
    """Values at the points of `square` as an image, the first row lowest."""
    side = int(len(values) ** 0.5)
    return values.view(side, side).numpy()


def shade(axes: Axes, density: Tensor) -> None:
    """Draw the density of `square` as a pale ground."""
    axes.imshow(as_map(density.sqrt()), origin="lower", extent=(-HALF, HALF, -HALF, HALF), cmap="Blues", alpha=0.6)


def frame(axes: Axes) -> None:
    """The square that the toy figures show."""
    axes.set(xlim=(-HALF - 1, HALF + 1), ylim=(-HALF - 1, HALF + 1), aspect="equal")
    axes.set_xticks(range(-HALF, HALF + 1, 4))
    axes.set_yticks(range(-HALF, HALF + 1, 4))
    axes.grid(False)


if __name__ == "__main__":
    _stage.run("figures", __doc__, main)
