"""Put what the trained network does with a part of an image, with a class, and between two images, into pictures.

inpainting      the left half of a test image is known, the right half is drawn, several times
colourisation   its grey values are known, of images in colour (arXiv:2011.13456, appendix I.4)
classes         images of each class, by the gradient of the classifier of `features`, if the data has labels: it sees
                the image that the network expects, so it need not know of noise (arXiv:2302.07121)
interpolation   rows of chains that share their start and mix two noises, from one image to another (arXiv:2006.09011)

Reads out/data, out/features, out/schedule, out/train and the section `sample`; writes out/strips: a PNG for each, and
strips.json. Image i depends on (seed, i) alone.
"""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ncsn import guidance, images, random, samplers
from ncsn.losses import Score
from pipeline import _neighbours, _params, _stage, features, prepare, sample
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
    sampler, classes = drawer.sampler, prepare.manifest()["classes"]
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
        if sampler.shape[0] == 3 and sampler.space != "logits":  # whose means are not those of pixels
            record["colourisation"] = colourisation(drawer, out / "colourisation.png")
        if classes is not None:
            record["classes"] = guided_classes(drawer, classes, out / "classes.png")
        write_json(out / "strips.json", record)
    for name, found in record.items():
        if name != "sampler":
            log.info("%s: %s", name, found["measured"])


def inpainting(drawer: Drawer, path: Path, *, rows: int = 8, times: int = 6) -> dict[str, Any]:
    """Test images, what is known of each, and completions by the whole sampler, the known pixels put in at each step.

    Measured are distances over the unknown pixels, a mean over pairs: of completions of one image from each other,
    and from the truth.
    """
    chosen, real = some_tests(drawer, rows)
    mask = torch.zeros(real.shape[1:], dtype=torch.bool, device=drawer.device)
    mask[..., : real.shape[-1] // 2] = True
    x = complete(drawer, real.repeat_interleave(times, 0), mask)
    colour = torch.tensor(UNKNOWN, device=drawer.device)[:, None, None]
    tiles = [rgb(real), torch.where(mask, rgb(real), colour), *rgb(x).unflatten(0, (rows, times)).unbind(1)]
    plate(torch.stack(tiles, 1), ["original", "known", *map(str, range(1, times + 1))], path)
    return {
        "settings": {"known": "left half", "test_images": chosen, "completions": times, "steps_per_draw": 1},
        "measured": spread(x[:, ~mask].unflatten(0, (rows, times)), real[:, None, ~mask]),
    }


def colourisation(drawer: Drawer, path: Path, *, rows: int = 8, times: int = 6) -> dict[str, Any]:
    """Test images, their grey values, and pictures with these by the whole sampler, which is told them at each step.

    Measured are distances as in `inpainting`, over all pixels.
    """
    chosen, real = some_tests(drawer, rows)
    grey = real.mean(1, keepdim=True)
    x = coloured(drawer, grey.repeat_interleave(times, 0))
    tiles = [real, rgb(grey), *x.unflatten(0, (rows, times)).unbind(1)]
    plate(torch.stack(tiles, 1), ["original", "known", *map(str, range(1, times + 1))], path)
    return {
        "settings": {"known": "mean of the channels", "test_images": chosen, "completions": times, "steps_per_draw": 1},
        "measured": spread(x.flatten(1).unflatten(0, (rows, times)), real.flatten(1)[:, None]),
    }


def guided_classes(
    drawer: Drawer, classes: list[str], path: Path, *, columns: int = 10, scale: float = 4.0, most: int = 10
) -> dict[str, Any]:
    """A row of images for each of the first classes, drawn by the classifier's gradient from the noise of the samples.

    The gradient is taken `scale` times, as it is short where little but noise is to be seen, and not through the
    network, whose derivative may be far from right: Langevin steps with it diverge for an NCSNv2.

    Measured is the share of images of the class that was asked for: by the classifier itself, which has led there; and
    by the nearest training image (Euclidean distance of pixels), which has not, and errs where the data's classes are
    not those of neighbours: `of_test_images` is its share for real images. `without_guidance` is the classifier's for
    the same noise.
    """
    rows = min(most, len(classes))
    label = torch.arange(rows, device=drawer.device).repeat_interleave(columns)
    index = torch.arange(columns, device=drawer.device).repeat(rows)
    classifier = features.load_classifier().to(drawer.device)
    test, answers = features.labelled("test")
    every = max(1, len(test) // 500)
    real = images.to_float(torch.from_numpy(np.array(test[::every])))
    std = float(drawer.to_space(real).std())
    x = of_classes(drawer, classifier, index, label, scale=scale, spread=std)
    plain = draw(drawer, index[:columns], random.seeded_noise(drawer.sampler.seed, index[:columns]), "classes")
    plate(rgb(x).unflatten(0, (rows, columns)), [str(k + 1) for k in range(columns)], path, classes[:rows])
    return {
        "settings": {"classes": classes[:rows], "images": columns, "scale": scale, "spread": std},
        "measured": {
            "by_the_classifier": share(classifier(x).argmax(1), label),
            "by_the_nearest_image": share(labels_of_nearest(x), label),
            "of_test_images": share(labels_of_nearest(real), torch.from_numpy(np.array(answers[::every]))),
            "without_guidance": share(classifier(plain).argmax(1).repeat(rows), label),
        },
    }


def of_classes(
    drawer: Drawer, classifier: torch.nn.Module, index: Tensor, label: Tensor, *, scale: float, spread: float
) -> Tensor:
    """Images in [0, 1] with these numbers of classes with these numbers, both of shape (N,); see `ncsn.guidance`."""

    def log_prob(x: Tensor) -> Tensor:
        logits = classifier(drawer.to_pixels(x))
        return logits.log_softmax(1).gather(1, label[:, None])[:, 0]

    network = drawer.model.score
    score = guidance.guided(network, guidance.of_denoised(network, log_prob, spread=spread), scale=scale)
    return draw(drawer, index, random.seeded_noise(drawer.sampler.seed, index), "classes", score=score)


def labels_of_nearest(x: Tensor) -> Tensor:
    """Labels of the training images that are nearest to images in [0, 1], int64, shape (N,), on the CPU."""
    data, labels = features.labelled("train")
    queries = 255 * x.cpu().numpy()
    found = _neighbours.nearest(queries, queries, data, np.arange(len(data)), k=1)  # no mirror: a 2 is no 5
    return torch.from_numpy(labels[found.index[:, 0]])


def share(found: Tensor, expected: Tensor) -> float:
    """Of labels that are as expected."""
    return float((found.cpu() == expected.cpu()).double().mean())


def some_tests(drawer: Drawer, n: int) -> tuple[list[int], Tensor]:
    """Numbers of n test images, evenly spread, and the images in [0, 1] on the drawer's device."""
    data, _ = prepare.load("test")
    chosen = np.linspace(0, len(data) - 1, n).astype(int)
    return chosen.tolist(), images.to_float(torch.from_numpy(data[chosen])).to(drawer.device)


def spread(completions: Tensor, truth: Tensor) -> dict[str, float]:
    """Mean distances of the completions (R, K, D) of an image from each other, and from the truth (R, 1, D)."""
    rows, times = completions.shape[:2]
    among = torch.cdist(completions, completions).sum() / (rows * times * max(times - 1, 1))
    to_truth = torch.cdist(completions, truth).mean()
    return {"distance_among_completions": float(among), "distance_to_truth": float(to_truth)}


def coloured(drawer: Drawer, grey: Tensor) -> Tensor:
    """Images with these grey values (N, 1, H, W), drawn each from its own noise."""
    index, seed = torch.arange(len(grey), device=drawer.device), drawer.sampler.seed
    known = samplers.colourisation(drawer.to_space(grey), random.seeded_noise(seed, index, random.KNOWN))
    x = draw(drawer, index, random.seeded_noise(seed, index), "colourisation", known)
    return (x + grey - x.mean(1, keepdim=True)).clamp(0, 1)


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
    score: Score | None = None,
) -> Tensor:
    """Images in [0, 1] by the sampler of the stage `sample`, with this noise, projection and score."""
    s = drawer.sampler
    with _stage.progress(s.steps, "step", what) as bar:

        def observe(x: Tensor, step: int, sigma: float) -> None:
            bar.update()

        x = drawer.pixels(index, score=score, noise=noise, project=project, observe=observe)
        return x.clamp(0, 1)


def rgb(x: Tensor) -> Tensor:
    """Images (N, C, H, W) with three channels."""
    return x.expand(-1, 3, -1, -1)


def plate(tiles: Tensor, names: list[str], path: Path, beside: list[str] | None = None) -> None:
    """Draw rows of images in [0, 1], shape (R, K, 3, H, W), under the names of their columns, beside those of rows."""
    columns = tiles.shape[1]
    canvas = images.grid(images.to_uint8(tiles.flatten(0, 1)).cpu(), columns)
    height, width = canvas.shape[1:]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.7 * columns, 0.7 * columns * height / width + 0.3), layout="constrained")
        axes = figure.subplots()
        axes.imshow(canvas.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_xticks((np.arange(columns) + 0.5) * (width - 1) / columns, names)
        axes.tick_params(top=False, bottom=False, left=False, labeltop=True, labelbottom=False, pad=1)
        rows = len(beside or [])
        axes.set_yticks((np.arange(rows) + 0.5) * (height - 1) / max(rows, 1), beside or [])
        axes.spines[:].set_visible(False)
        axes.grid(False)
        figure.savefig(path, dpi=120)


if __name__ == "__main__":
    _stage.run("strips", __doc__, main)
