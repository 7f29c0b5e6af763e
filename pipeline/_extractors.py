"""Feature extractors of torch-fidelity: our classifier, registered there, and Inception, with its file checked first.

Nothing is downloaded here; `pipeline.fetch` gets the weights.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor
from tqdm import tqdm

from ncsn import images
from pipeline import features
from pipeline._stage import StageError
from pipeline._store import sha256

BATCH = 64  # torch-fidelity's own
INCEPTION = "inception-v3-compat"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"  # how the digest begins; torch-hub files carry it in their name
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


class ClassifierExtractor(FeatureExtractorBase):  # type: ignore[misc]
    """The data set's classifier as torch-fidelity wants it: uint8 images (B, 3, H, W) to a tuple of layers.

    Args:
        name: The name it is registered under, as in classifier.json.
        features_list: Layers to return: "features", "logits".
        feature_extractor_weights_path: classifier.safetensors, with classifier.json beside it.
        **kwargs: torch-fidelity's other settings, which mean nothing here.

    Raises:
        StageError: If the weights are of another extractor or not the ones classifier.json describes.
    """

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | Path, **kwargs: Any
    ) -> None:
        super().__init__(name, features_list)
        path = Path(feature_extractor_weights_path)
        info = features.manifest(path.parent)
        if info["extractor"] != name:
            raise StageError(f"{path} is of {info['extractor']!r}, expected {name!r}")
        found = sha256(path)
        if found != info["sha256"]:
            raise StageError(
                f"{path} has SHA-256 {found}, but classifier.json says {info['sha256']}: "
                f"write both anew with `dvc repro --single-item --force features`"
            )
        self.channels = info["shape"][0]
        self.network = features.Classifier(info["shape"], len(info["classes"]))
        self.network.load_state_dict(load_file(path))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = images.to_float(x[:, : self.channels])
        pooled = self.network.features(x)
        layers = {"features": pooled, "logits": self.network.head(pooled)}
        return tuple(layers[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


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
        name: str = FEATURE_EXTRACTORS_REGISTRY[self.name].get_default_feature_layer_for_metric(metric)
        return name

    def __call__(self, x: np.ndarray, what: str) -> dict[str, Tensor]:
        """The features and logits of images, with a progress bar.

        Args:
            x: uint8, (N, C, H, W) with C = 3, or C = 1, which is repeated to 3.
            what: Name of the images, for the progress bar.

        Returns:
            Layer name to float32 (N, d), on the CPU.
        """
        cuda = torch.cuda.is_available()
        layers = [self.layer("fid"), self.layer("isc")]
        extractor = create_feature_extractor(
            self.name, layers, cuda=cuda, feature_extractor_weights_path=str(self.weights), verbose=False
        )
        parts = []
        # Without TensorFloat-32, whose 10 bits would make a GPU's features differ from a CPU's in the third digit.
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for first in tqdm(range(0, len(x), BATCH), unit="batch", desc=f"features of {what}"):
                batch = torch.from_numpy(np.array(x[first : first + BATCH])).expand(-1, 3, -1, -1)
                parts.append([layer.cpu() for layer in extractor(batch.cuda() if cuda else batch)])
        return {name: torch.cat(rows) for name, rows in zip(layers, zip(*parts, strict=True), strict=True)}


def register_classifier(name: str) -> None:
    """Make a classifier known to torch-fidelity; again is no error."""
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, ClassifierExtractor)


def classifier(folder: Path = features.OUT) -> Extractor:
    """The classifier that the stage `features` trained, registered.

    Raises:
        StageError: If it has not been trained.
    """
    info = features.manifest(folder)
    register_classifier(info["extractor"])
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
