"""Judge the samples: FID, KID, IS, precision and recall against the training images, each with a passport.

Reads out/data, out/features, out/samples and the section `evaluate`; writes out/evaluate: metrics.json (numbers) and
passports.json (what each number was computed from). Three yardsticks are judged in the same way: real test images (the
floor), the same blurred, and images of the untrained network. FID falls with the number of images, so the samples are
judged twice: all of them (fid_digits_1k), and as many as each yardstick has (fid_digits_360.samples beside .test).

evaluate.extractor=classifier           the classifier of the stage `features`; needs labels
evaluate.extractor=inception-v3-compat  Inception; needs its weights on this machine, nothing is downloaded
evaluate.extractor=auto                 the classifier if there are labels, else Inception if its weights are there
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from ncsn.metrics import Moments, frechet_distance
from pipeline import _extractors, _params, _stage, _track, features, prepare, sample
from pipeline._stage import StageError, log
from pipeline._store import code_digest, replacing_folder, write_json

OUT = Path("out/evaluate")
SPLITS = 10  # of IS
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3  # of precision and recall
NEIGHBOURHOOD_IMAGES = 10_000  # reference images that precision and recall use: their cost is quadratic
LEAST_IMAGES = NEIGHBOURS + 1
CONFIDENT = 0.9
TOLERATED_DIFFERENCE = 0.05  # of a channel's mean or deviation, images in [0, 1]

Passport = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """A metric's value, its spread where there is one, the layer it was computed in, and further settings."""

    metric: str
    value: float
    std: float | None = None
    layer: str | None = None
    settings: dict[str, Any] | None = None


@dataclass(frozen=True)
class ImageSet:
    """Images to be judged, uint8 (N, C, H, W), and where they come from: a sampler's manifest, or words."""

    images: np.ndarray
    manifest: dict[str, Any] | None = None
    source: str | None = None


@dataclass(frozen=True)
class Reference:
    """What is compared with: the training images.

    Args:
        features: float32 (N, d).
        moments: Of all the features.
        neighbours: float32 (M, d): those that precision and recall use, drawn by the seed if there are too many.
    """

    features: Tensor
    moments: Moments
    neighbours: Tensor

    @classmethod
    def of(cls, rows: Tensor, seed: int) -> "Reference":
        return cls(rows, Moments.of(rows), rows[draw(len(rows), NEIGHBOURHOOD_IMAGES, seed)])


def main(params: _params.Params) -> None:
    extractor = choose_extractor(params.evaluate)
    if extractor is None:
        reason = (
            f"nothing was measured: {prepare.manifest()['name']} has no labels to train a classifier on, and there are "
            f"no Inception weights; name the file with evaluate.inception_weights=PATH ({_extractors.INCEPTION_URL})"
        )
        log.warning(reason)
        write(OUT, [], reason)
        return
    with _track.run(params) as run:
        passports = measure(extractor, params.evaluate.seed)
        write(OUT, passports)
        log.info("against the training images:\n%s", table(passports))
        run.metrics({f"eval/{passport['name']}": passport["value"] for passport in passports})
        run.artifact(OUT / "passports.json", "evaluate")


def write(folder: Path, passports: list[Passport], reason: str | None = None) -> None:
    """Write metrics.json and passports.json; `reason` says why there are none."""
    with replacing_folder(folder) as part:
        write_json(part / "metrics.json", {passport["name"]: passport["value"] for passport in passports})
        write_json(part / "passports.json", {"reason": reason, "passports": passports})


def choose_extractor(settings: _params.Evaluate) -> _extractors.Extractor | None:
    """The extractor that `evaluate.extractor` asks for; None if auto finds none.

    Raises:
        StageError: If the one that was asked for cannot be had.
    """
    info, data = features.manifest(), prepare.manifest()
    labelled = info["labelled"]
    if labelled and (info["shape"], info["classes"]) != (data["shape"], data["classes"]):
        raise StageError(f"{features.OUT} is of another data set than {data['name']}: train it anew with `dvc repro`")
    if settings.extractor == "classifier" and not labelled:
        raise StageError(
            "evaluate.extractor='classifier': the data set has no labels to train a classifier on, "
            "expected auto or inception-v3-compat"
        )
    if settings.extractor == "classifier" or (settings.extractor == "auto" and labelled):
        return _extractors.classifier()
    path = _extractors.inception_path(settings.inception_weights)
    if settings.extractor == "auto" and settings.inception_weights is None and not path.is_file():
        return None
    return _extractors.inception(path)


def measure(extractor: _extractors.Extractor, seed: int) -> list[Passport]:
    """The passports of all metrics of the samples and of the yardsticks."""
    sets = image_sets(seed)
    train, _ = prepare.load("train")
    reference = Reference.of(extractor(train, "train")[extractor.layer("fid")], seed)
    found = {kind: extractor(each.images, kind) for kind, each in sets.items()}
    common = provenance(extractor)
    samples, n = len(sets["samples"].images), len(sets["test"].images)

    passports = []
    for kind, count, suffix in [("samples", samples, ""), *((kind, n, f".{kind}") for kind in sets)]:
        layers = {layer: rows[:count] for layer, rows in found[kind].items()}
        for score in distances(layers, extractor, reference, seed):
            name = f"{score.metric}_{extractor.short}_{thousands(count)}{suffix}"
            passports.append(passport(name, score, kind, count, sets[kind], common))
    views = channel_differences(sets["samples"].images, train)
    if extractor.classes is not None:
        views += class_views(found["samples"], extractor)
    passports += [passport(score.metric, score, "samples", samples, sets["samples"], common) for score in views]
    return [{**each, "rank_deficient": each["n"] <= reference.features.shape[1]} for each in passports]


def image_sets(seed: int) -> dict[str, ImageSet]:
    """The samples, all of them, and as many images as there are everywhere of each yardstick."""
    data, (test, _) = prepare.manifest(), prepare.load("test")
    drawn, untrained = (sample.manifest(sample.OUT / kind) for kind in ("ema", "untrained"))
    for manifest in (drawn, untrained):
        if manifest["shape"] != data["shape"]:
            raise StageError(
                f"the samples have shape {manifest['shape']}, the data {data['shape']}: draw them anew with `dvc repro`"
            )
    sizes = {"the training set": data["splits"]["train"]["n"], "the test set": len(test)}
    check_sizes(sizes | {"out/samples/ema": drawn["n"], "out/samples/untrained": untrained["n"]})
    n = min(len(test), drawn["n"], untrained["n"])
    held_out = test[draw(len(test), n, seed)]
    words = f"{n} of {len(test)} test images, drawn by seed {seed}"
    return {
        "samples": ImageSet(sample.load(sample.OUT / "ema"), drawn),
        "test": ImageSet(held_out, source=words),
        "blurred": ImageSet(blur(held_out), source=f"{words}, Gaussian blur of {blur_sigma(test.shape[-1]):g} pixels"),
        "untrained": ImageSet(sample.load(sample.OUT / "untrained")[:n], untrained),
    }


def provenance(extractor: _extractors.Extractor) -> Passport:
    """What all passports have in common."""
    data = prepare.manifest()
    train = data["splits"]["train"]
    return {
        "reference": {"data": data["name"], "split": "train", "n": train["n"], "sha256": train["sha256"]},
        "extractor": {
            "name": extractor.name,
            "weights_sha256": extractor.sha256,
            "test_accuracy": extractor.test_accuracy,
        },
        "preprocessing": preprocessing(extractor, data["shape"]),
        "code": {"revision": _track.revision(), "digest": code_digest("ncsn", "pipeline")},
    }


def passport(name: str, score: Score, kind: str, n: int, images: ImageSet, common: Passport) -> Passport:
    """All there is to know of one number, computed from the first n images of a set.

    Raises:
        StageError: If it is not finite.
    """
    if not math.isfinite(score.value):
        raise StageError(f"{name} is {score.value}: expected a finite number; look at the images of the set {kind!r}")
    return {
        "name": name,
        "metric": score.metric,
        "set": kind,
        "value": score.value,
        "std": score.std,
        "n": n,
        "settings": score.settings,
        **origin(images, n),
        **common,
        "extractor": {**common["extractor"], "layer": score.layer} if score.layer else None,
    }


def check_sizes(sizes: dict[str, int]) -> None:
    """Raise StageError if a set of images is too small to be judged."""
    for name, n in sizes.items():
        if n < LEAST_IMAGES:
            raise StageError(f"{name} holds {n} images: expected at least {LEAST_IMAGES}; raise sample.n or add data")


def distances(
    generated: dict[str, Tensor], extractor: _extractors.Extractor, reference: Reference, seed: int
) -> list[Score]:
    """FID, IS, KID, precision and recall of one set of images.

    FID comes from float64 moments (`ncsn.metrics`), the others from torch-fidelity. IS is a number of the set alone.

    Args:
        generated: Layer name to float32 (n, d).
        extractor: It names each metric's layer.
        reference: The training images.
        seed: Of the order of images in IS and of the subsets in KID.
    """
    rows, logits = generated[extractor.layer("fid")], generated[extractor.layer("isc")]
    splits = min(SPLITS, len(rows))
    isc = isc_features_to_metric(logits, splits, True, seed)
    kid_settings = {
        "kid_subsets": KID_SUBSETS,
        "kid_subset_size": min(KID_SUBSET_SIZE, len(rows), len(reference.features)),
    }
    kid = kid_features_to_metric(rows, reference.features, rng_seed=seed, verbose=False, **kid_settings)
    prc_settings = {"prc_neighborhood": NEIGHBOURS}
    # save_cpu_ram: distances in blocks of rows instead of one matrix of all pairs
    prc = prc_features_to_metric(
        rows, reference.neighbours, prc_batch_size=1000, save_cpu_ram=True, verbose=False, **prc_settings
    )
    seeded = {"seed": seed}
    prc_settings |= {"reference_n": len(reference.neighbours), **seeded}
    layer, isc_layer = extractor.layer("fid"), extractor.layer("isc")
    return [
        Score("fid", frechet_distance(Moments.of(rows), reference.moments), None, layer),
        Score("is", isc[KEY_METRIC_ISC_MEAN], isc[KEY_METRIC_ISC_STD], isc_layer, {"isc_splits": splits, **seeded}),
        Score("kid", kid[KEY_METRIC_KID_MEAN], kid[KEY_METRIC_KID_STD], layer, {**kid_settings, **seeded}),
        Score("precision", prc[KEY_METRIC_PRECISION], None, layer, prc_settings),
        Score("recall", prc[KEY_METRIC_RECALL], None, layer, prc_settings),
    ]


def class_views(found: dict[str, Tensor], extractor: _extractors.Extractor) -> list[Score]:
    """What the classifier sees in images: the share it is sure of, and each class's share."""
    layer, classes = extractor.layer("isc"), extractor.classes or []
    confidence, winner = found[layer].double().softmax(dim=1).max(dim=1)
    shares = torch.bincount(winner, minlength=len(classes)).double() / len(winner)
    # MLflow takes no other characters; a slash would make a group of its own there.
    names = [re.sub(r"[^A-Za-z0-9. -]", "_", name) for name in classes]
    if len(set(names)) < len(names):
        names = [f"{k}_{name}" for k, name in enumerate(names)]
    return [
        Score("confident_fraction", float((confidence > CONFIDENT).double().mean()), layer=layer),
        *(Score(f"share_{name}", float(share), layer=layer) for name, share in zip(names, shares, strict=True)),
    ]


def channel_differences(x: np.ndarray, data: np.ndarray) -> list[Score]:
    """Mean and standard deviation of each channel's pixels, in [0, 1], samples minus data; both uint8 (N, C, H, W)."""
    scores = []
    for channel, name in enumerate({1: [""], 3: ["_red", "_green", "_blue"]}[x.shape[1]]):
        (mean_x, std_x), (mean, std) = (mean_and_std(each[:, channel]) for each in (x, data))
        scores += [Score(f"mean_difference{name}", mean_x - mean), Score(f"std_difference{name}", std_x - std)]
    for score in scores:
        if abs(score.value) > TOLERATED_DIFFERENCE:
            log.warning(
                "%s = %+.3f: more than %g, the samples' tones are not the data's",
                score.metric,
                score.value,
                TOLERATED_DIFFERENCE,
            )
    return scores


def mean_and_std(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of v / 255 for uint8 values (N, ...), exact and in little memory: by a histogram."""
    blocks = (values[first : first + 1000] for first in range(0, len(values), 1000))
    histogram = np.sum([np.bincount(block.ravel(), minlength=256) for block in blocks], axis=0)
    weights, levels = histogram / histogram.sum(), np.arange(256) / 255
    mean = weights @ levels
    return float(mean), float(np.sqrt(weights @ (levels - mean) ** 2))


def draw(n: int, k: int, seed: int) -> np.ndarray:
    """Sorted numbers of min(n, k) of n rows, without repetition: a data set may be sorted by class."""
    return np.sort(np.random.default_rng(seed).permutation(n)[:k])


def blur_sigma(side: int) -> float:
    """Width of the blur in pixels: half a pixel at 8x8, 2 at 32x32; plainly bad, with the subject still to be seen."""
    return side / 16


def blur(x: np.ndarray) -> np.ndarray:
    """Gaussian blur of uint8 images (N, C, H, W); weights beyond the border go to the pixels within."""

    def kernel(side: int) -> np.ndarray:
        distance = np.subtract.outer(np.arange(side), np.arange(side))
        weights = np.exp(-0.5 * (distance / blur_sigma(x.shape[-1])) ** 2).astype(np.float32)
        return weights / weights.sum(axis=1, keepdims=True)

    blurred = kernel(x.shape[2]) @ x @ kernel(x.shape[3]).T
    return np.rint(blurred).astype(np.uint8)


def origin(images: ImageSet, n: int) -> Passport:
    """Where the first n images of a set come from; what only generated images have is None for real ones."""
    if images.manifest is None:
        return {"source": images.source, "seeds": None, "checkpoint": None, "sampler": None, "nfe": None}
    manifest = images.manifest
    return {
        "source": None,
        "seeds": {"seed": manifest["seed"], "first": 0, "last": n - 1},
        "checkpoint": {
            "sha256": manifest["weights_sha256"],
            "step": manifest["step"],
            "weights": manifest["weights"],
        },
        "sampler": manifest["sampler"],
        "nfe": manifest["nfe"],
    }


def preprocessing(extractor: _extractors.Extractor, shape: list[int]) -> str:
    """What happens to the pixels before the extractor's first layer."""
    grey = ", grey repeated to 3 channels" if shape[0] == 1 else ""
    if extractor.name == _extractors.INCEPTION:
        return f"uint8, bilinear resize to 299x299 as in TensorFlow 1{grey}"
    return f"uint8, no resize{grey}"


def thousands(n: int) -> str:
    """1000 -> "1k", 360 -> "360"."""
    return f"{n // 1000}k" if n % 1000 == 0 else str(n)


def table(passports: list[Passport]) -> str:
    """The metrics of each set, for people."""
    metrics = ("fid", "is", "kid", "precision", "recall")
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for each in passports:
        if each["metric"] in metrics:
            rows.setdefault((each["set"], each["n"]), {})[each["metric"]] = each["value"]
    lines = [f"{'set':<10}{'n':>7}" + "".join(f"{metric:>11}" for metric in metrics)]
    for (kind, n), values in rows.items():
        lines.append(f"{kind:<10}{n:>7}" + "".join(f"{values[metric]:>11.4g}" for metric in metrics))
    return "\n".join(lines)


if __name__ == "__main__":
    _stage.run("evaluate", __doc__, main)
