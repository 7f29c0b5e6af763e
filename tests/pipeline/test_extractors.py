"""Features by a pool of workers, and Inception with random weights: what torch-fidelity computes of the same images."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from torch_fidelity import feature_extractor_inceptionv3 as library
from torch_fidelity.metric_isc import isc_features_to_metric

from ncsn.metrics import Moments
from pipeline import _extractors, _fidelity, _ray, _reference, evaluate, features
from pipeline._params import Params
from pipeline._stage import StageError
from pipeline._store import sha256, write_json
from tests.pipeline.doubles import Pictures

Compose = Callable[..., Params]


@pytest.fixture
def classifier(tmp_path: Path) -> _extractors.Extractor:
    """An untrained one, of digits."""
    network = features.Classifier((1, 8, 8), 10)
    features.initialise(network, torch.Generator().manual_seed(0))
    path = tmp_path / "classifier.safetensors"
    return write(network, path)


def write(network: torch.nn.Module, path: Path) -> _extractors.Extractor:
    features.save_file({key: value.contiguous() for key, value in network.state_dict().items()}, path)
    content = {"extractor": "digits-classifier", "shape": [1, 8, 8], "classes": list("0123456789")}
    write_json(path.with_name("classifier.json"), content | {"sha256": sha256(path), "test_accuracy": 0.1})
    return _extractors.classifier(path.parent)


def test_layers_are_those_that_torch_fidelity_takes(classifier: _extractors.Extractor) -> None:
    inception = _extractors.Extractor(_extractors.INCEPTION, Path("unused"), "0")
    for extractor, library_s in (
        (inception, library.FeatureExtractorInceptionV3),
        (classifier, _fidelity.ClassifierExtractor),
    ):
        for metric in ("fid", "kid", "prc", "isc"):
            assert extractor.layer(metric) == library_s.get_default_feature_layer_for_metric(metric)


def pixels(n: int, channels: int = 1, side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, channels, side, side), dtype=np.uint8)


@pytest.mark.usefixtures("one_cluster")
def test_features_do_not_depend_on_the_pool(
    classifier: _extractors.Extractor, compose_params: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = compose_params().runtime
    x = pixels(150)
    whole = classifier.open()(x)
    network = features.Classifier((1, 8, 8), 10)
    features.initialise(network, torch.Generator().manual_seed(0))
    torch.nn.init.constant_(network.head[-1].bias, torch.nan)
    (tmp_path / "broken").mkdir()
    broken = write(network, tmp_path / "broken" / "classifier.safetensors")
    sets = {
        "all": _extractors.Pictures(150, x, moments=True),
        "mirrored": _extractors.Pictures(20, x, mirrored=True),
        "some": _extractors.Pictures(150, x, moments=True, kept=np.array([3, 70, 149])),
    }
    here = _extractors.extract(classifier, sets, runtime, block=64)
    monkeypatch.setattr(_extractors, "FEW", 0)
    found = _extractors.extract(classifier, sets, runtime, block=64)
    again = _extractors.extract(classifier, sets, replace(runtime, actors=1), block=64)
    with pytest.raises(StageError, match=r"^logits of all is not finite for image 0 and 63 more of 64: expected"):
        _extractors.extract(broken, {"all": sets["all"]}, replace(runtime, actors=1), block=64)
    with pytest.raises(StageError, match=r"has SHA-256 [0-9a-f]{64}, expected 0{64}: it is not opened"):
        _extractors.extract(replace(classifier, sha256="0" * 64), sets, replace(runtime, actors=1))
    for layer, rows in whole.items():
        torch.testing.assert_close(found["all"].layers[layer], rows, rtol=1e-5, atol=1e-5)
        assert torch.equal(found["some"].layers[layer], found["all"].layers[layer][[3, 70, 149]])
        assert torch.equal(again["all"].layers[layer], found["all"].layers[layer])
        assert torch.equal(here["all"].layers[layer], found["all"].layers[layer])
    rows = found["all"].layers["features"]
    for each in (found["all"], found["some"], again["all"], here["some"]):
        assert each.moments is not None
        torch.testing.assert_close(each.moments.cov, Moments.of(rows).cov, rtol=1e-9, atol=1e-12)
        assert torch.equal(each.moments.scatter, found["all"].moments.scatter)
    mirrored = classifier.open()(x[:20, ..., ::-1])["features"]
    torch.testing.assert_close(found["mirrored"].layers["features"], mirrored, rtol=1e-5, atol=1e-5)
    assert found["mirrored"].moments is None


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _extractors.Extractor:
    """Inception with random weights, in a file like the published one, through the same door."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = library.FeatureExtractorInceptionV3("x", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
    path = tmp_path / _extractors.INCEPTION_FILE
    torch.save(network.state_dict(), path)
    monkeypatch.setattr(_extractors, "INCEPTION_SHA256", sha256(path)[:8])
    return _extractors.inception(path)


def seen(extractor: _extractors.Extractor, x: np.ndarray, folder: Path) -> _extractors.Features:
    """What a worker computes of a block, in this process."""
    np.save(folder / "x.npy", x)
    np.save(folder / "weights.npy", np.frombuffer(extractor.weights.read_bytes(), np.uint8))
    files = {extractor.weights.name: _ray.Shared(path=folder / "weights.npy")}
    pictures = _extractors.Pictures(len(x), _ray.Shared(path=folder / "x.npy"), moments=True)
    found: _extractors.Features = _extractors._Pass(extractor, files, {"x": pictures})()(("x", 0, len(x)))
    return found


def test_inception_with_random_weights_agrees_with_torch_fidelity(
    inception: _extractors.Extractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "feature_extractor": inception.name,
        "feature_extractor_weights_path": str(inception.weights),
        "cuda": torch.cuda.is_available(),
        "batch_size": _extractors.BATCH,
        "rng_seed": 0,
        "cache": False,
        "save_cpu_ram": True,
        "verbose": False,
    }
    # IS by the whole network, of few images: one takes half a second.
    few = pixels(4, 3, 32, seed=3)
    isc = torch_fidelity.calculate_metrics(input1=Pictures(few), isc=True, isc_splits=2, **settings)
    layers = seen(inception, few, tmp_path).layers
    assert (layers["2048"].shape, layers["logits_unbiased"].shape) == ((4, 2048), (4, 1008))
    assert layers["2048"].std(dim=0).mean() > 0.001  # not all alike
    mean, std = (
        isc_features_to_metric(layers["logits_unbiased"], 2, True, 0)[key]
        for key in (torch_fidelity.KEY_METRIC_ISC_MEAN, torch_fidelity.KEY_METRIC_ISC_STD)
    )
    assert mean == pytest.approx(isc[torch_fidelity.KEY_METRIC_ISC_MEAN], rel=1e-6)
    assert std == pytest.approx(isc[torch_fidelity.KEY_METRIC_ISC_STD], rel=1e-6)

    # The rest in 64 features, which few images suffice for: of a covariance without full rank the library takes the
    # square root by way of complex eigenvalues near zero, which are noise.
    monkeypatch.setattr(_extractors.Extractor, "layer", lambda self, metric: "64")
    monkeypatch.setattr(
        library.FeatureExtractorInceptionV3, "get_default_feature_layer_for_metric", staticmethod(lambda metric: "64")
    )
    x, data = pixels(68, 3, 32, seed=1), pixels(72, 3, 32, seed=2) // 2
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(x),
        input2=Pictures(data),
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=68,
        prc_batch_size=1000,
        **settings,
    )
    one, two = (seen(inception, each, tmp_path) for each in (x, data))
    reference = _reference.Reference.of(two.layers["64"], 0, two.moments)
    monkeypatch.setattr("torch_fidelity.metric_isc.isc_features_to_metric", lambda *args: dict.fromkeys(isc, 1.0))
    ours = {score.metric: score.value for score in evaluate.distances(one.layers, inception, reference, 0)}
    assert ours["fid"] == pytest.approx(theirs[torch_fidelity.KEY_METRIC_FID], rel=1e-6)
    assert ours["kid"] == pytest.approx(theirs[torch_fidelity.KEY_METRIC_KID_MEAN], rel=1e-6)
    assert ours["precision"] == theirs[torch_fidelity.KEY_METRIC_PRECISION]
    assert ours["recall"] == theirs[torch_fidelity.KEY_METRIC_RECALL]
