"""Has the model learned its training images by heart? Samples and held-out images beside the training images nearest
to each, in pixels and in features, where the mirror image counts as the image itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from ncsn import images
from pipeline._pictures import STYLE
from pipeline._stage import log

QUERIES = 1_000  # samples, and held-out images, at most
SHOWN, COLUMNS = 8, 4  # queries in the picture, and of each its neighbours
LISTED, NEAREST = 10, 5  # queries whose neighbours are written down, and how many of these
NEAR = 0.01  # share of held-out images that count as near
SUSPICIOUS = 0.05  # share of near samples from which on one should look at them
BLOCK = 2**22  # values compared at a time: 32 MB as float64


@dataclass(frozen=True)
class Nearest:
    """The training images nearest to each query, nearest first: numbers and distances, each (Q, k)."""

    index: np.ndarray
    distance: np.ndarray

    def __getitem__(self, rows: slice) -> "Nearest":
        return Nearest(self.index[rows], self.distance[rows])


@dataclass(frozen=True)
class Finding:
    """What was found in one space: of the samples, and of held-out images."""

    space: str
    samples: Nearest
    test: Nearest

    @property
    def threshold(self) -> float:
        """The distance below which the nearest held-out images are, a share `NEAR` of them."""
        return float(np.quantile(self.test.distance[:, 0], NEAR))

    @property
    def near(self) -> float:
        """The share of the samples that are nearer than that to a training image; about `NEAR` for new images."""
        return float((self.samples.distance[:, 0] < self.threshold).mean())

    def warn(self) -> None:
        """Say so if it is suspicious."""
        if self.near > SUSPICIOUS:
            log.warning(
                "%.1f %% of the samples are nearer to a training image, in %s, than the nearest %.0f %% of held-out "
                "images (distance %.4g): more than %.0f %%, some may be copies; look at out/evaluate/neighbours.png",
                *(100 * self.near, self.space, 100 * NEAR, self.threshold, 100 * SUSPICIOUS),
            )

    def as_dict(self) -> dict[str, Any]:
        """For neighbours.json: all distances, and the first queries' neighbours."""
        return {
            "threshold": self.threshold,
            "near": self.near,
            **{
                kind: {
                    "index": found.index[:LISTED].tolist(),
                    "distance": found.distance[:LISTED].tolist(),
                    "nearest": found.distance[:, 0].tolist(),
                }
                for kind, found in (("samples", self.samples), ("test", self.test))
            },
        }


def in_pixels(x: np.ndarray, test: np.ndarray, data: np.ndarray, index: np.ndarray) -> Finding:
    """In Euclidean distance of pixels in [0, 1]; all uint8 (N, C, H, W), of the data the images with these numbers."""
    samples, held_out = (nearest(each, each[..., ::-1], data, index) for each in (x, test))
    return Finding("pixels", *(Nearest(found.index, found.distance / 255) for found in (samples, held_out)))


def in_features(found: dict[str, Tensor], features: Tensor, index: np.ndarray) -> Finding:
    """In Euclidean distance of features.

    Args:
        found: "samples", "samples_mirrored", "test" and "test_mirrored": float32 (Q, d).
        features: Of the training images, float32 (N, d).
        index: Their numbers.
    """
    kinds = ("samples", "test")
    queries = ((found[kind].numpy(), found[f"{kind}_mirrored"].numpy()) for kind in kinds)
    return Finding("features", *(nearest(*each, features.numpy(), index, rows=True) for each in queries))


def nearest(
    x: np.ndarray, mirrored: np.ndarray, data: np.ndarray, index: np.ndarray, *, k: int = NEAREST, rows: bool = False
) -> Nearest:
    """The k rows of data that are nearest to each query or its mirror image, in Euclidean distance.

    Squares are summed up in float64, exact for pixels: equal images have distance 0, and ties go by number. The data is
    read in blocks.

    Args:
        x: Queries, (Q, ...).
        mirrored: The same in a mirror.
        data: (N, ...).
        index: Numbers of the rows that count, sorted; of all N, or, if `rows`, what the N rows are called.
        k: How many; all if there are fewer.
    """
    queries = np.concatenate([x, mirrored]).reshape(2 * len(x), -1).astype(np.float64)
    lengths = np.square(queries).sum(axis=1)[:, None]
    best = np.empty((len(x), 0))
    numbers = np.empty((len(x), 0), dtype=int)
    size = max(k, BLOCK // max(queries.shape))
    for first in tqdm(range(0, len(index), size), unit="block", desc="nearest neighbours", leave=False):
        here = index[first : first + size]
        block = data[first : first + size] if rows else data[here]
        block = block.reshape(len(block), -1).astype(np.float64)
        squares = lengths + np.square(block).sum(axis=1) - 2 * queries @ block.T
        squares = np.minimum(squares[: len(x)], squares[len(x) :])
        best = np.concatenate([best, squares], axis=1)
        numbers = np.concatenate([numbers, np.broadcast_to(here, squares.shape)], axis=1)
        order = np.argsort(best, axis=1, kind="stable")[:, :k]
        best, numbers = (np.take_along_axis(each, order, axis=1) for each in (best, numbers))
    return Nearest(numbers, np.sqrt(np.maximum(best, 0)))


def picture(x: dict[str, np.ndarray], data: np.ndarray, findings: list[Finding], path: Path) -> None:
    """Draw the first samples, and as many held-out images, each beside the training images nearest to it.

    Args:
        x: "samples" and "test", uint8 (N, C, H, W).
        data: The training images.
        findings: In each space.
        path: Of the PNG.
    """
    kinds = {"samples": "samples", "test": "held-out images"}
    rows = {kind: min(SHOWN, len(x[kind])) for kind in kinds}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.7 * len(kinds) * len(findings), 0.53 * max(rows.values()) + 0.4))
        plates = figure.subplots(1, len(kinds) * len(findings), squeeze=False)[0]
        for k, (kind, title) in enumerate(kinds.items()):
            for j, finding in enumerate(findings):
                found = (finding.samples if kind == "samples" else finding.test)[: rows[kind]]
                tiles = np.concatenate([x[kind][: rows[kind], None], data[found.index[:, :COLUMNS]]], axis=1)
                axes = plates[k * len(findings) + j]
                show(axes, tiles, found.distance[:, :COLUMNS])
                axes.set_title(f"{title}, nearest in {finding.space}", fontsize=8)
        figure.subplots_adjust(0.01, 0.01, 0.99, 0.94, wspace=0.05)
        figure.savefig(path, dpi=130)


def show(axes: Any, tiles: np.ndarray, distance: np.ndarray) -> None:
    """Rows of images, uint8 (R, 1 + K, C, H, W), the first one framed, the others with their distances."""
    rows, columns, _, height, width = tiles.shape
    canvas = images.grid(torch.from_numpy(np.ascontiguousarray(tiles.reshape(-1, *tiles.shape[2:]))), columns)
    pixels = canvas.permute(1, 2, 0).numpy()
    axes.imshow(pixels if pixels.shape[2] == 3 else pixels[:, :, 0], cmap="gray", vmin=0, vmax=255)
    step = (pixels.shape[0] - 1) / rows, (pixels.shape[1] - 1) / columns
    for row in range(rows):
        for column in range(distance.shape[1]):
            place = (column + 1) * step[1] + 0.06 * width, row * step[0] + 0.06 * height
            axes.text(
                *place,
                f"{distance[row, column]:.3g}",
                fontsize=6,
                va="top",
                color="white",
                bbox={"facecolor": "black", "alpha": 0.6, "pad": 0.6, "linewidth": 0},
            )
    axes.axvline(step[1], color="C1", lw=2)
    axes.set_axis_off()


def plot(findings: list[Finding], path: Path) -> None:
    """Draw how near samples and held-out images are to the training images: shares of images below each distance."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(findings), 3.2), layout="constrained")
        for axes, finding in zip(figure.subplots(1, len(findings), squeeze=False)[0], findings, strict=True):
            for found, label, colour in ((finding.test, "held-out images", "0.5"), (finding.samples, "samples", "C0")):
                distance = np.sort(found.distance[:, 0])
                share = np.arange(1, len(distance) + 1) / len(distance)
                axes.step(distance, share, where="post", label=f"{len(distance):,} {label}", color=colour)
            axes.axvline(finding.threshold, color="C1", lw=1, ls="--", label=f"nearest {NEAR:.0%} of the held-out")
            axes.set(xlabel=f"distance in {finding.space}", ylabel="share of images", ylim=(0, 1.02), xlim=(0, None))
            axes.set_title(f"{finding.near:.1%} of the samples are nearer than that")
            axes.legend(fontsize=7)
        figure.savefig(path, dpi=130)
