"""Judge the samples: FID, KID, IS, precision and recall against the training images, each with a passport.

Reads out/data, out/features, out/samples and the section `evaluate`; writes out/evaluate: metrics.json (numbers),
passports.json (what each number was computed from), and neighbours.json, neighbours.png and distances.png (whether the
samples are copies of training images). Three yardsticks are judged in the same way: real test images (the floor), the
same blurred, and images of the untrained network. FID falls with the number of images, so the samples are judged twice:
all of a range (fid_digits_1k), and as many as each yardstick has (fid_digits_360.samples beside .test). With
sample.ranges=3 each range is judged, and fid_digits_1k.mean has mean and spread.

Features of more than a few images are computed by a pool of Ray workers; those of the training images are kept in
runtime.storage.

evaluate.extractor=classifier           the classifier of the stage `features`; needs labels
evaluate.extractor=inception-v3-compat  Inception; needs its weights on this machine, nothing is downloaded
evaluate.extractor=auto                 the classifier if there are labels, else Inception if its weights are there
"""

import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ncsn.metrics import Moments, frechet_distance
from pipeline import _extractors, _neighbours, _params, _reference, _stage, _track, prepare, sample
from pipeline._reference import Reference, draw
from pipeline._stage import StageError, log
from pipeline._store import code_digest, replacing_folder, write_json

OUT = Path("out/evaluate")
SPLITS = 10  # of IS
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3  # of precision and recall
LEAST_IMAGES = NEIGHBOURS + 1
CONFIDENT = 0.9
TOLERATED_DIFFERENCE = 0.05  # of a channel's mean or deviation, images in [0, 1], or of the share of its pixels
FLAT = 1 / 255  # standard deviation of an image's pixels up to which it shows nothing
TOLERATED_FLAT = 0.01  # share of such images beyond that in the data

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

    @property
    def ranges(self) -> int:
        """Of how many ranges of numbers they are."""
        return int(self.manifest["ranges"]) if self.manifest else 1


def main(params: _params.Params) -> None:
    extractor = _extractors.choose(params.evaluate)
    with _track.run(params) as run, replacing_folder(OUT) as out:
        if extractor is None:
            reason = (
                f"nothing was measured: {prepare.manifest()['name']} has no labels to train a classifier on, and there "
                "are no Inception weights; name the file with evaluate.inception_weights=PATH "
                f"({_extractors.INCEPTION_URL})"
            )
            log.warning(reason)
            passports: list[Passport] = []
            findings = [pixel_neighbours(image_sets(params.evaluate.seed))]
            write(out, [], reason)
        else:
            passports, findings = measure(extractor, params)
            write(out, passports)
            log.info("against the training images:\n%s", table(passports))
        illustrate(findings, out, params.evaluate.seed)
        run.metrics({f"eval/{passport['name']}": passport["value"] for passport in passports})
        run.artifact(out, "evaluate")
        run.tables("evaluate/table.json")


def write(folder: Path, passports: list[Passport], reason: str | None = None) -> None:
    """Write metrics.json, passports.json and table.json into a folder; `reason` says why there are none."""
    write_json(folder / "metrics.json", {passport["name"]: passport["value"] for passport in passports})
    write_json(folder / "passports.json", {"reason": reason, "passports": passports})
    columns, rows = columns_and_rows(passports)
    write_json(folder / "table.json", {"columns": columns, "data": rows})


def illustrate(findings: list[_neighbours.Finding], folder: Path, seed: int) -> None:
    """Write what was found on neighbours: numbers, pictures and warnings."""
    x = {kind: each.images for kind, each in image_sets(seed).items() if kind in ("samples", "test")}
    write_json(folder / "neighbours.json", {finding.space: finding.as_dict() for finding in findings})
    _neighbours.picture(x, prepare.load("train")[0], findings, folder / "neighbours.png")
    _neighbours.plot(findings, folder / "distances.png")
    for finding in findings:
        finding.warn()


def measure(
    extractor: _extractors.Extractor, params: _params.Params
) -> tuple[list[Passport], list[_neighbours.Finding]]:
    """The passports of all metrics of the samples and of the yardsticks, and the samples' neighbours."""
    seed, sets = params.evaluate.seed, image_sets(params.evaluate.seed)
    reference, found = all_features(extractor, sets, params)
    common, width = provenance(extractor), reference.features.shape[1]
    ranges, n = sets["samples"].ranges, len(sets["test"].images)
    every = len(sets["samples"].images) // ranges

    passports: list[Passport] = []
    for kind, first, count, suffix in judged(ranges, every, n):
        layers = {layer: rows[first : first + count] for layer, rows in found[kind].items()}
        for score in distances(layers, extractor, reference, seed):
            name = f"{score.metric}_{extractor.short}_{thousands(count)}{suffix}"
            label = suffix.removeprefix(".") or kind
            passports.append(passport(name, score, label, count, sets[kind], common, first))
    if ranges > 1:
        passports += spread(passports, f"_{extractor.short}_{thousands(every)}", every * ranges)

    x, (train, _) = sets["samples"].images, prepare.load("train")
    views = channel_differences(x, train) + health(x, train)
    if extractor.classes is not None:
        views += class_views(found["samples"], extractor)
    findings = [pixel_neighbours(sets), feature_neighbours(found, extractor, reference)]
    views += [nearness(finding, extractor) for finding in findings]
    passports += [passport(score.metric, score, "samples", len(x), sets["samples"], common) for score in views]
    return [{**each, "rank_deficient": each["n"] <= width} for each in passports], findings


def judged(ranges: int, every: int, n: int) -> Iterator[tuple[str, int, int, str]]:
    """What is judged: kind of images, the first one, how many, and what is put behind the metric's name."""
    yield "samples", 0, every, ""
    for r in range(1, ranges):
        yield "samples", r * every, every, f".range_{r + 1}"
    for kind in ("samples", "test", "blurred", "untrained"):
        yield kind, 0, n, f".{kind}"


def spread(passports: list[Passport], middle: str, n: int) -> list[Passport]:
    """Mean and standard deviation over the ranges, of each metric that was measured in all."""
    found: dict[str, list[Passport]] = {}
    for each in passports:
        if each["name"] == f"{each['metric']}{middle}" or each["set"].startswith("range_"):
            found.setdefault(each["metric"], []).append(each)
    means = []
    for metric, parts in found.items():
        values, first = [part["value"] for part in parts], parts[0]
        means.append(
            {
                **first,
                "name": f"{metric}{middle}.mean",
                "set": "mean",
                "value": statistics.fmean(values),
                "std": statistics.stdev(values),
                "settings": {**(first["settings"] or {}), "ranges": len(values), "values": values},
                "seeds": {**first["seeds"], "last": n - 1},
            }
        )
    return means


def all_features(
    extractor: _extractors.Extractor, sets: dict[str, ImageSet], params: _params.Params
) -> tuple[Reference, dict[str, dict[str, Tensor]]]:
    """The training images' features, and those of all sets, and of some in a mirror."""
    wanted = {}
    for kind, each in sets.items():
        pixels = np.ascontiguousarray(each.images)
        wanted[kind] = _extractors.Pictures(len(each.images), pixels)
        if kind in ("samples", "test"):
            queries = min(_neighbours.QUERIES, len(each.images))
            wanted[f"{kind}_mirrored"] = _extractors.Pictures(queries, pixels, mirrored=True)
    reference, found = _reference.beside(extractor, wanted, params)
    return reference, {kind: each.layers for kind, each in found.items()}


def pixel_neighbours(sets: dict[str, ImageSet]) -> _neighbours.Finding:
    """The training images nearest to the first samples, and to test images, in pixels."""
    x, test = (sets[kind].images[: _neighbours.QUERIES] for kind in ("samples", "test"))
    return _neighbours.in_pixels(x, test, prepare.load("train")[0], _reference.kept(len(prepare.load("train")[0])))


def feature_neighbours(
    found: dict[str, dict[str, Tensor]], extractor: _extractors.Extractor, reference: Reference
) -> _neighbours.Finding:
    """The same in features."""
    layer = extractor.layer("fid")
    rows = {
        kind: found[kind][layer][: _neighbours.QUERIES]
        for kind in ("samples", "samples_mirrored", "test", "test_mirrored")
    }
    return _neighbours.in_features(rows, reference.features, reference.index)


def nearness(finding: _neighbours.Finding, extractor: _extractors.Extractor) -> Score:
    """The share of samples that are as near to a training image as few held-out images are."""
    layer = extractor.layer("fid") if finding.space == "features" else None
    queries, held_out = len(finding.samples.distance), len(finding.test.distance)
    settings = {"queries": queries, "held_out": held_out, "nearest": _neighbours.NEAR, "flips": True}
    return Score(f"near_fraction_{finding.space}", finding.near, None, layer, settings)


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
        "preprocessing": _extractors.preprocessing(extractor, data["shape"]),
        "code": {"revision": _track.revision(), "digest": code_digest("ncsn", "pipeline")},
    }


def passport(
    name: str, score: Score, kind: str, n: int, images: ImageSet, common: Passport, first: int = 0
) -> Passport:
    """All there is to know of one number, computed from n images of a set.

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
        **origin(images, n, first),
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
    # Here, since torch-fidelity imports torchvision, which takes seconds, and the report only shows what is found.
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

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


def health(x: np.ndarray, data: np.ndarray) -> list[Score]:
    """Shares of pixels that are 0 or 255, samples minus data, and of images that show nothing; uint8 (N, C, H, W).

    Clipped to 0 and 255 is what a sampler drives too far; images without contrast are what a broken one ends in. Fewer
    of them are no fault: backgrounds of exactly 0 are lost in the last noise level.
    """
    (black, white, flat), theirs = shares(x), shares(data)
    scores = [
        Score("black_difference", black - theirs[0]),
        Score("white_difference", white - theirs[1]),
        Score("flat_difference", flat - theirs[2]),
    ]
    limits = (TOLERATED_DIFFERENCE, TOLERATED_DIFFERENCE, TOLERATED_FLAT)
    what = ("pixels that are 0", "pixels that are 255", "images without contrast")
    for score, limit, words in zip(scores, limits, what, strict=True):
        if score.value > limit:
            log.warning(
                "%s = %+.3f: the share of %s exceeds the data's by more than %g; look at out/samples/grid.png",
                *(score.metric, score.value, words, limit),
            )
    return scores


def shares(x: np.ndarray) -> tuple[float, float, float]:
    """The shares of pixels that are 0, that are 255, and of images whose pixels hardly differ."""
    counts = np.zeros(3)
    for first in range(0, len(x), 1000):  # in little memory
        block = x[first : first + 1000]
        flat = (block.reshape(len(block), -1) / 255).std(axis=1) <= FLAT
        counts += (block == 0).sum(), (block == 255).sum(), flat.sum()
    return float(counts[0] / x.size), float(counts[1] / x.size), float(counts[2] / len(x))


def mean_and_std(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of v / 255 for uint8 values (N, ...), exact and in little memory: by a histogram."""
    blocks = (values[first : first + 1000] for first in range(0, len(values), 1000))
    histogram = np.sum([np.bincount(block.ravel(), minlength=256) for block in blocks], axis=0)
    weights, levels = histogram / histogram.sum(), np.arange(256) / 255
    mean = weights @ levels
    return float(mean), float(np.sqrt(weights @ (levels - mean) ** 2))


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


def origin(images: ImageSet, n: int, first: int = 0) -> Passport:
    """Where n images of a set come from; what only generated images have is None for real ones."""
    if images.manifest is None:
        return {"source": images.source, "seeds": None, "checkpoint": None, "sampler": None, "nfe": None}
    manifest = images.manifest
    return {
        "source": None,
        "seeds": {"seed": manifest["seed"], "first": first, "last": first + n - 1},
        "checkpoint": {
            "sha256": manifest["weights_sha256"],
            "step": manifest["step"],
            "weights": manifest["weights"],
            "selection": manifest["selection"],
        },
        "sampler": manifest["sampler"],
        "nfe": manifest["nfe"],
    }


def thousands(n: int) -> str:
    """1000 -> "1k", 360 -> "360"."""
    return f"{n // 1000}k" if n % 1000 == 0 else str(n)


def table(passports: list[Passport]) -> str:
    """The metrics of each set, for people."""
    columns, rows = columns_and_rows(passports)
    lines = [f"{columns[0]:<10}{columns[1]:>7}" + "".join(f"{name:>11}" for name in columns[2:])]
    for kind, n, *values in rows:
        lines.append(f"{kind:<10}{n:>7}" + "".join(f"{value:>11.4g}" for value in values))
    return "\n".join(lines)


def columns_and_rows(passports: list[Passport]) -> tuple[list[str], list[list[Any]]]:
    """The metrics of each set; with ranges, also their mean and their spread."""
    found = {each["metric"] for each in passports}
    metrics = [metric for metric in ("fid", "is", "kid", "precision", "recall") if metric in found]
    rows: dict[tuple[str, int], dict[str, float]] = {}
    for each in passports:
        if each["metric"] in metrics:
            rows.setdefault((each["set"], each["n"]), {})[each["metric"]] = each["value"]
            if each["set"] == "mean":
                rows.setdefault(("spread", each["n"]), {})[each["metric"]] = each["std"]
    return ["set", "n", *metrics], [[kind, n, *(row[metric] for metric in metrics)] for (kind, n), row in rows.items()]


if __name__ == "__main__":
    _stage.run("evaluate", __doc__, main)
