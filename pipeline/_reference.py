"""What samples are compared with: features of the training images, computed once and kept in runtime.storage."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from ncsn.metrics import Moments
from pipeline import _extractors, _params, prepare
from pipeline._stage import log
from pipeline._store import Store, code_digest, fingerprint, store

KEPT = (
    50_000  # images whose features are kept, drawn without repetition if there are more; all of them make the moments
)
NEIGHBOURHOOD_IMAGES = 10_000  # that precision and recall use: their cost is quadratic
CODE = (
    *("pipeline/_extractors.py", "pipeline/_reference.py", "pipeline/features.py"),
    *("ncsn/images.py", "ncsn/metrics.py"),
)
FEATURES, META = "features.safetensors", "meta.json"


@dataclass(frozen=True)
class Reference:
    """The training images.

    Args:
        index: Sorted numbers of the images that are kept.
        features: Of these, float32 (N, d).
        moments: Of all images.
        neighbours: float32 (M, d): those that precision and recall use, drawn by the seed if there are too many.
    """

    index: np.ndarray
    features: Tensor
    moments: Moments
    neighbours: Tensor

    @classmethod
    def of(
        cls, rows: Tensor, seed: int, moments: Moments | None = None, index: np.ndarray | None = None
    ) -> "Reference":
        """From the features that are kept: all of them, unless moments and numbers are given."""
        index = np.arange(len(rows)) if index is None else index
        return cls(index, rows, moments or Moments.of(rows), rows[draw(len(rows), NEIGHBOURHOOD_IMAGES, seed)])


def beside(
    extractor: _extractors.Extractor, sets: dict[str, _extractors.Pictures], params: _params.Params
) -> tuple[Reference, dict[str, _extractors.Features]]:
    """The training images, from storage if they are there, and the features of sets of images."""
    where, n = place(extractor, params.runtime), prepare.manifest()["splits"]["train"]["n"]
    reference = read(where, params.evaluate.seed)
    found = _extractors.extract(extractor, sets if reference else {"train": pictures(), **sets}, params.runtime)
    if reference is None:
        train = found.pop("train")
        rows = train.layers[extractor.layer("fid")]
        reference = Reference.of(rows, params.evaluate.seed, train.moments, kept(n))
        write(where, reference)
    return reference, found


def place(extractor: _extractors.Extractor, runtime: _params.Runtime) -> Store:
    """Where the features of the training images lie; the name hashes all that determines them."""
    data = prepare.manifest()
    identity = {
        "data": data["splits"]["train"]["sha256"],
        "split": "train",
        "shape": data["shape"],
        "extractor": [extractor.name, extractor.sha256, extractor.layer("fid")],
        "preprocessing": _extractors.preprocessing(extractor, data["shape"]),
        "kept": KEPT,
        "code": code_digest(
            "pipeline/_extractors.py",
            "pipeline/_reference.py",
            "pipeline/features.py",
            "ncsn/images.py",
            "ncsn/metrics.py",
        ),
    }
    return store(runtime.storage) / f"reference-{fingerprint(identity)}"


def pictures() -> _extractors.Pictures:
    """The training images for `_extractors.extract`."""
    split, file = prepare.manifest()["splits"]["train"], prepare.OUT / "train.npy"
    return _extractors.Pictures(split["n"], file, split["sha256"], moments=True, kept=kept(split["n"]))


def kept(n: int) -> np.ndarray:
    """Sorted numbers of the images whose features are kept."""
    return draw(n, KEPT, 0)


def read(where: Store, seed: int) -> Reference | None:
    """What `write` has written there; None if there is nothing, or it is damaged, which is reported."""
    try:
        meta: dict[str, Any] = json.loads(where.read(META))
        content = where.read(FEATURES)
    except FileNotFoundError:
        return None
    except ValueError:
        meta, content = {}, b""
    if hashlib.sha256(content).hexdigest() != meta.get("sha256"):
        log.warning("the features of the training images in %s are damaged and computed anew", where.uri)
        return None
    log.info("features of the training images: from %s", where.uri)
    found = load(content)
    moments = Moments(meta["n"], found["mean"], found["scatter"])
    return Reference.of(found["features"], seed, moments, found["index"].numpy())


def write(where: Store, reference: Reference) -> None:
    """Keep it, for other evaluations on the same data by the same extractor."""
    moments = reference.moments
    content = save(
        {
            "features": reference.features.contiguous(),
            "index": torch.from_numpy(reference.index),
            "mean": moments.mean,
            "scatter": moments.scatter.contiguous(),
        }
    )
    meta = {"n": moments.n, "sha256": hashlib.sha256(content).hexdigest()}
    where.remove(META)  # of a damaged one, while the features are others
    where.write(FEATURES, content)
    where.write(META, (json.dumps(meta, indent=2) + "\n").encode())


def draw(n: int, k: int, seed: int) -> np.ndarray:
    """Sorted numbers of min(n, k) of n rows, without repetition: a data set may be sorted by class."""
    return np.sort(np.random.default_rng(seed).permutation(n)[:k])
