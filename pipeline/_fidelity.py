"""The data set's classifier for torch-fidelity's own commands and functions, by its name.

A module of its own: torch-fidelity imports torchvision, which takes seconds.
"""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from pipeline import _extractors, features
from pipeline._stage import StageError


class ClassifierExtractor(FeatureExtractorBase):  # type: ignore[misc]
    """The classifier as torch-fidelity wants it: uint8 images (B, 3, H, W) to a tuple of layers.

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
        if (found := features.manifest(path.parent)["extractor"]) != name:
            raise StageError(f"{path} is of {found!r}, expected {name!r}")
        self.layers = _extractors.Layers(path)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = dict(zip(_extractors.Layers.names, self.layers(x), strict=True))
        return tuple(found[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return _extractors.Layers.names

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


def register(name: str) -> None:
    """Make the classifier known to torch-fidelity; again is no error."""
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(name, ClassifierExtractor)
