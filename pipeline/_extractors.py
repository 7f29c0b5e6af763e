"""Feature extractors: the data set's classifier, and torch-fidelity's Inception, with its file checked first.

Nothing is downloaded here; `pipeline.fetch` gets the weights. torch-fidelity knows the classifier by its name after
`_fidelity.register`.
"""

import functools
import math
import operator
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ncsn import images
from ncsn.metrics import Moments
from pipeline import _params, _ray, _stage, features, prepare
from pipeline._stage import StageError
from pipeline._store import sha256

BATCH = 64  # torch-fidelity's own
BLOCK = 1000  # images whose features a worker computes at a time
FEW = 5_000_000  # values of all images up to which the classifier takes less time than workers take to start
INCEPTION = "inception-v3-compat"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # how the digest begins; torch-hub files carry it in their name
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


class Layers(nn.Module):
    """The data set's classifier as an extractor.

    Args:
        weights: classifier.safetensors, with classifier.json beside it.

    Raises:
        StageError: If the weights are not the ones classifier.json describes.
    """

    names = "features", "logits"

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.channels = features.manifest(weights.parent)["shape"][0]
        self.network = features.load_classifier(weights)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """uint8 images (B, 3, H, W) to the layers of `names`; of grey ones the first channel counts."""
        pooled = self.network.features(images.to_float(x[:, : self.channels]))
        return pooled, self.network.head(pooled)


@dataclass(frozen=True)
class Extractor:
    """A checked extractor.

    Args:
        name: In torch-fidelity's registry.
        weights: Their file.
        sha256: Of the file.
        test_accuracy: Of a classifier of ours; None for Inception.
        classes: Those of a classifier of ours; None for Inception.
    """

    name: str
    weights: Path
    sha256: str
    test_accuracy: float | None = None
    classes: list[str] | None = None

    @property
    def short(self) -> str:
        """The name within a metric's name: fid_digits_1k, fid_inception_50k."""
        return self.name.removesuffix("-v3-compat").removesuffix("-classifier")

    def layer(self, metric: str) -> str:
        """The layer that torch-fidelity's metric "fid", "kid", "prc" or "isc" is computed in."""
        name, logits = ("2048", "logits_unbiased") if self.classes is None else Layers.names
        return logits if metric == "isc" else name

    @property
    def files(self) -> list[Path]:
        """What `open` needs."""
        return [self.weights, *([self.weights.with_name("classifier.json")] if self.classes is not None else [])]

    def open(self) -> Callable[[np.ndarray], dict[str, Tensor]]:
        """The network, as a function of images: uint8, (N, C, H, W), C = 3 or 1, to layer name to float32 (N, d) on the
        CPU.

        Raises:
            StageError: If the weights are not those that were checked.
        """
        if (found := sha256(self.weights)) != self.sha256:
            fix = "download it" if self.classes is None else "write it with `dvc repro --single-item --force features`"
            raise StageError(
                f"{self.weights} has SHA-256 {found}, expected {self.sha256}: it is not opened; {fix} anew"
            )
        cuda = torch.cuda.is_available()
        layers = list(dict.fromkeys([self.layer("fid"), self.layer("isc")]))
        network: nn.Module
        if self.classes is not None:
            network = Layers(self.weights)
        else:
            # Here, since it imports torchvision, which takes seconds.
            from torch_fidelity.utils import create_feature_extractor

            network = create_feature_extractor(
                self.name, layers, cuda=False, feature_extractor_weights_path=str(self.weights), verbose=False
            )
        network = network.requires_grad_(False).to("cuda" if cuda else "cpu")

        def of(x: np.ndarray) -> dict[str, Tensor]:
            parts = []
            # Without TensorFloat-32, whose 10 bits would make a GPU's features differ from a CPU's in the third digit.
            with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                for first in range(0, len(x), BATCH):
                    batch = torch.from_numpy(np.array(x[first : first + BATCH])).expand(-1, 3, -1, -1)
                    parts.append([layer.cpu() for layer in network(batch.cuda() if cuda else batch)])
            return {name: torch.cat(rows) for name, rows in zip(layers, zip(*parts, strict=True), strict=True)}

        return of


@dataclass(frozen=True)
class Pictures:
    """Images that workers compute features of.

    Args:
        n: How many.
        pixels: uint8 (N, C, H, W), N >= n; or their .npy file, and `digest`, its hash.
        mirrored: Whether they are to be seen in a mirror.
        moments: Whether the moments are wanted.
        kept: Sorted numbers of those whose features are wanted; all by default.
    """

    n: int
    pixels: np.ndarray | Path | _ray.Shared
    digest: str = ""
    mirrored: bool = False
    moments: bool = False
    kept: np.ndarray | None = None

    def open(self) -> np.ndarray:
        """The pixels, mapped into memory if they lie in a file."""
        if isinstance(self.pixels, Path):
            mapped: np.ndarray = np.load(self.pixels, mmap_mode="r")
            return mapped
        return self.pixels.open() if isinstance(self.pixels, _ray.Shared) else self.pixels

    def shared(self, runtime: _params.Runtime) -> "Pictures":
        """The same, readable to all workers of the cluster, within one."""
        if isinstance(self.pixels, Path):
            return replace(self, pixels=_ray.share(self.pixels, self.digest, runtime))
        return self if isinstance(self.pixels, _ray.Shared) else replace(self, pixels=_ray.put(self.pixels))


@dataclass(frozen=True)
class Features:
    """Of a set of images.

    Args:
        layers: Layer name to float32 (N, d), of those that were wanted.
        moments: Of the layer that FID is computed in, of all images, if they were wanted.
    """

    layers: dict[str, Tensor]
    moments: Moments | None = None


def extract(
    extractor: Extractor, sets: Mapping[str, Pictures], runtime: _params.Runtime, block: int = BLOCK
) -> dict[str, Features]:
    """The features of all sets, computed in fixed blocks, with a progress bar: by a pool of workers, or here if few.

    Moments are added up in the order of the blocks, so that the result depends neither on how many workers there are
    nor on which of them is first.

    Raises:
        StageError: If features are not finite, or the weights not those that were checked.
    """
    jobs = [
        (name, first, min(first + block, pictures.n))
        for name, pictures in sets.items()
        for first in range(0, pictures.n, block)
    ]
    found: dict[tuple[str, int, int], Features] = {}
    with _stage.progress(sum(pictures.n for pictures in sets.values()), "image", "features") as bar:
        for job, part in _computed(extractor, sets, jobs, runtime):
            found[job] = part
            bar.update(job[2] - job[1])
    whole = {}
    for name in sets:
        parts = [found[job] for job in jobs if job[0] == name]
        layers = {layer: torch.cat([part.layers[layer] for part in parts]) for layer in parts[0].layers}
        moments = [part.moments for part in parts if part.moments is not None]
        whole[name] = Features(layers, functools.reduce(operator.add, moments) if moments else None)
    return whole


def _computed(
    extractor: Extractor, sets: Mapping[str, Pictures], jobs: list[tuple[str, int, int]], runtime: _params.Runtime
) -> Iterator[tuple[tuple[str, int, int], Features]]:
    values = sum(each.n * math.prod(each.open().shape[1:]) for each in sets.values())
    if extractor.classes is not None and values <= FEW:
        work = _worker(extractor, sets)
        with features.one_thread():
            yield from ((job, work(job)) for job in jobs)
    else:
        with _ray.cluster(runtime):
            files = {path.name: _ray.put(path.read_bytes()) for path in extractor.files}
            shared = {name: each.shared(runtime) for name, each in sets.items()}
            yield from _ray.shards(_Pass(extractor, files, shared), jobs, runtime)


@dataclass(frozen=True)
class _Pass:
    """Makes the function of a worker: from a block of a set to its features."""

    extractor: Extractor
    files: Mapping[str, _ray.Shared]
    sets: Mapping[str, Pictures]

    def __call__(self) -> Callable[[tuple[str, int, int]], Features]:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self.files.items():
                Path(folder, name).write_bytes(content.open())
            return _worker(replace(self.extractor, weights=Path(folder, self.extractor.weights.name)), self.sets)


def _worker(extractor: Extractor, sets: Mapping[str, Pictures]) -> Callable[[tuple[str, int, int]], Features]:
    network, fid = extractor.open(), extractor.layer("fid")

    def work(job: tuple[str, int, int]) -> Features:
        name, first, last = job
        pictures = sets[name]
        x = pictures.open()[first:last]
        layers = network(x[..., ::-1] if pictures.mirrored else x)
        for layer, rows in layers.items():
            bad = (~rows.isfinite()).any(1).nonzero().flatten().tolist()
            if bad:
                raise StageError(
                    f"{layer} of {name} is not finite for image {first + bad[0]} and {len(bad) - 1} more of "
                    f"{last - first}: expected finite features; look at that image, and at the weights of "
                    f"{extractor.name}"
                )
        moments = Moments.of(layers[fid]) if pictures.moments else None
        if pictures.kept is not None:
            here = pictures.kept[(pictures.kept >= first) & (pictures.kept < last)] - first
            layers = {layer: rows[torch.from_numpy(here)] for layer, rows in layers.items()}
        return Features(layers, moments)

    return work


def choose(settings: _params.Evaluate) -> Extractor | None:
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
        return classifier()
    path = inception_path(settings.inception_weights)
    if settings.extractor == "auto" and settings.inception_weights is None and not path.is_file():
        return None
    return inception(path)


def preprocessing(extractor: Extractor, shape: list[int]) -> str:
    """What happens to the pixels before the extractor's first layer."""
    grey = ", grey repeated to 3 channels" if shape[0] == 1 else ""
    if extractor.name == INCEPTION:
        return f"uint8, bilinear resize to 299x299 as in TensorFlow 1{grey}"
    return f"uint8, no resize{grey}"


def classifier(folder: Path = features.OUT) -> Extractor:
    """The classifier that the stage `features` trained.

    Raises:
        StageError: If it has not been trained.
    """
    info = features.manifest(folder)
    return Extractor(
        info["extractor"],
        folder / "classifier.safetensors",
        info["sha256"],
        info["test_accuracy"],
        info["classes"],
    )


def inception_path(given: str | None) -> Path:
    """Where the Inception weights are to lie: the given file, or torch.hub's cache ($TORCH_HOME/hub/checkpoints)."""
    return Path(given) if given else Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)


def inception(path: Path) -> Extractor:
    """Inception with weights from a file. The file is a pickle, which may run code: its hash is checked before.

    Raises:
        StageError: If the file is missing or not the published one.
    """
    if not path.is_file():
        raise StageError(
            f"the Inception weights {path.absolute()} do not exist: get them with `python -m pipeline.fetch`, put "
            f"{INCEPTION_URL} (95 MB) there, or name a copy with evaluate.inception_weights=PATH"
        )
    found = sha256(path)
    if not found.startswith(INCEPTION_SHA256):
        raise StageError(
            f"{path.absolute()} has SHA-256 {found}, expected one that begins with {INCEPTION_SHA256}: "
            f"it is not the published file and is not opened; download {INCEPTION_URL} anew"
        )
    return Extractor(INCEPTION, path, found)
