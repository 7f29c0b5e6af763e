"""Put what the trained network does with half an image, and between two images, into pictures.

inpainting     the left half of a test image is known, the right half is drawn, several times
interpolation  rows of chains that share their start and mix two noises, from one image to another (arXiv:2006.09011)

Reads out/data, out/schedule, out/train and the section `sample`; writes out/strips: a PNG for each, and strips.json.
Image i depends on (seed, i) alone.
"""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from ncsn import images, random, samplers
from pipeline import _params, _stage, prepare, sample
from pipeline._pictures import STYLE
from pipeline._sampler import Drawer
from pipeline._stage import StageError, log
from pipeline._store import replacing_folder, write_json

OUT = Path("out/strips")
UNKNOWN = (0.96, 0.78, 0.6)  # the colour of what is not known, as RGB


def main(params: _params.Params) -> None:
    torch.set_num_threads(1)  # a few small images: more threads would only wait for each other
    try:
        drawer = Drawer.of(sample.make_sampler(params, "ema"), sample.weights("ema"), params.runtime)
    except FileNotFoundError as error:
        raise StageError(f"{error.filename} does not exist: write it with `dvc repro train`") from error
    sampler = drawer.sampler
    with replacing_folder(OUT) as out:
        record = {
            "sampler": {
                "weights_sha256": sampler.weights_sha256,
                "step": sampler.step,
                "denoise": sampler.denoise,
                "nfe": sampler.nfe,
                "seed": sampler.seed,
            },
            "inpainting": inpainting(drawer, out / "inpainting.png"),
            "interpolation": interpolation(drawer, out / "interpolation.png"),
        }
        write_json(out / "strips.json", record)
    for name in ("inpainting", "interpolation"):
        log.info("%s: %s", name, record[name]["measured"])


def inpainting(drawer: Drawer, path: Path, *, rows: int = 8, times: int = 6) -> dict[str, Any]:
    """Test images, what is known of each, and completions by the whole sampler, the known pixels put in at each step.

    Measured are distances over the unknown pixels, a mean over pairs: of completions of one image from each other,
    and from the truth.
    """
    data, _ = prepare.load("test")
    chosen = np.linspace(0, len(data) - 1, rows).astype(int)
    real = images.to_float(torch.from_numpy(data[chosen])).to(drawer.device)
    mask = torch.zeros(real.shape[1:], dtype=torch.bool, device=drawer.device)
    mask[..., : real.shape[-1] // 2] = True
    x = complete(drawer, real.repeat_interleave(times, 0), mask)
    unknown, truth = x[:, ~mask].unflatten(0, (rows, times)), real[:, None, ~mask]
    among = torch.cdist(unknown, unknown).sum() / (rows * times * max(times - 1, 1))
    colour = torch.tensor(UNKNOWN, device=drawer.device)[:, None, None]
    tiles = [rgb(real), torch.where(mask, rgb(real), colour), *rgb(x).unflatten(0, (rows, times)).unbind(1)]
    plate(torch.stack(tiles, 1), ["original", "known", *map(str, range(1, times + 1))], path)
    return {
        "settings": {"known": "left half", "test_images": chosen.tolist(), "completions": times, "steps_per_draw": 1},
        "measured": {
            "distance_among_completions": float(among),
            "distance_to_truth": float(torch.cdist(unknown, truth).mean()),
        },
    }


def complete(drawer: Drawer, reference: Tensor, mask: Tensor) -> Tensor:
    """Images that are the reference (N, C, H, W) where the mask (C, H, W) is True, drawn each from its own noise."""
    index, seed = torch.arange(len(reference), device=drawer.device), drawer.sampler.seed
    known = samplers.inpainting(drawer.to_space(reference), mask, random.seeded_noise(seed, index, random.KNOWN))
    x = draw(drawer, index, random.seeded_noise(seed, index), "inpainting", known)
    return torch.where(mask, reference, x)


def interpolation(drawer: Drawer, path: Path, *, rows: int = 6, columns: int = 9) -> dict[str, Any]:
    """Rows of images between two: the noise of column k is cos(theta) p + sin(theta) q, theta from 0 to pi / 2.

    Measured are the mean distances of neighbours in a row and of its ends.
    """
    x = between(drawer, rows, columns)
    plate(rgb(x).unflatten(0, (rows, columns)), [f"{d:.3g}°" for d in np.linspace(0, 90, columns)], path)
    flat = x.flatten(1).unflatten(0, (rows, columns))
    return {
        "settings": {"rows": rows, "columns": columns, "angles": [0, 90]},
        "measured": {
            "distance_of_neighbours": float((flat[:, 1:] - flat[:, :-1]).norm(dim=2).mean()),
            "distance_of_ends": float((flat[:, -1] - flat[:, 0]).norm(dim=1).mean()),
        },
    }


def between(drawer: Drawer, rows: int, columns: int) -> Tensor:
    """Images in [0, 1], (rows columns, C, H, W): row i leads from image i of the stage `sample` to another."""
    index = torch.arange(rows, device=drawer.device).repeat_interleave(columns)
    angle = torch.linspace(0, math.pi / 2, columns, device=drawer.device).repeat(rows)
    p, q = (random.seeded_noise(drawer.sampler.seed, index, stream) for stream in (random.STEP, random.OTHER_END))
    return draw(drawer, index, samplers.interpolated(p, q, angle), "interpolation")


def draw(
    drawer: Drawer,
    index: Tensor,
    noise: samplers.Noise,
    what: str,
    project: samplers.Project | None = None,
) -> Tensor:
    """Images in [0, 1] by the sampler of the stage `sample`, with this noise and this projection."""
    s = drawer.sampler
    with tqdm(total=s.steps, unit="step", desc=what, mininterval=1) as bar:

        def observe(x: Tensor, step: int, sigma: float) -> None:
            bar.update()

        return drawer.pixels(index, noise=noise, project=project, observe=observe).clamp(0, 1)


def rgb(x: Tensor) -> Tensor:
    """Images (N, C, H, W) with three channels."""
    return x.expand(-1, 3, -1, -1)


def plate(tiles: Tensor, names: list[str], path: Path) -> None:
    """Draw rows of images in [0, 1], shape (R, K, 3, H, W), under the names of their columns."""
    columns = tiles.shape[1]
    canvas = images.grid(images.to_uint8(tiles.flatten(0, 1)).cpu(), columns)
    height, width = canvas.shape[1:]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.7 * columns, 0.7 * columns * height / width + 0.3), layout="constrained")
        axes = figure.subplots()
        axes.imshow(canvas.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_xticks((np.arange(columns) + 0.5) * (width - 1) / columns, names)
        axes.tick_params(top=False, bottom=False, labeltop=True, labelbottom=False, pad=1)
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.grid(False)
        figure.savefig(path, dpi=120)


if __name__ == "__main__":
    _stage.run("strips", __doc__, main)
