import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from safetensors.torch import load_file
from torch_fidelity.utils import create_feature_extractor

from pipeline import _extractors, _fidelity, features, prepare
from pipeline._params import Params
from pipeline._stage import StageError
from pipeline._store import read_json, sha256
from tests.pipeline.doubles import Pictures, Recorder

Compose = Callable[..., Params]
FILES = ("classifier.safetensors", "classifier.json")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, compose_params: Compose) -> tuple[Path, Recorder]:
    """The folder after prepare and features, and what was logged."""
    folder, recorder = tmp_path_factory.mktemp("digits"), Recorder()
    params = compose_params()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(features._track, "run", recorder.run)
        prepare.main(params)
        features.main(replace(params, features=replace(params.features, steps=300)))
    return folder, recorder


@pytest.fixture
def trained(digits: tuple[Path, Recorder], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, made the current one."""
    monkeypatch.chdir(digits[0])
    return digits[0]


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for name in FILES:
        (target / name).write_bytes((source / name).read_bytes())
    return target


def test_digits_are_told_apart(trained: Path, digits: tuple[Path, Recorder]) -> None:
    info = features.manifest()
    # Some 360 test images: a standard error of 0.009 at 0.97. The method reaches 0.99.
    assert info["test_accuracy"] >= 0.97
    assert digits[1].values == {"features/test_accuracy": info["test_accuracy"]}


def test_what_is_written(trained: Path) -> None:
    assert sorted(path.name for path in features.OUT.iterdir()) == sorted(FILES)
    info = features.manifest()
    assert info | {"test_accuracy": None} == {
        "labelled": True,
        "extractor": "digits-classifier",
        "shape": [1, 8, 8],
        "classes": [str(k) for k in range(10)],
        "feature_dim": 64,
        "test_accuracy": None,
        "steps": 300,
        "sha256": sha256(features.OUT / "classifier.safetensors"),
    }
    network = features.Classifier(info["shape"], 10)
    network.load_state_dict(load_file(features.OUT / "classifier.safetensors"))
    assert features.accuracy(network.eval(), *features.labelled("test")) == info["test_accuracy"]


def test_features_of_the_training_images_have_unit_variance(trained: Path) -> None:
    found = _extractors.classifier().open()(prepare.load("train")[0])["features"]
    assert found.shape == (len(prepare.load("train")[0]), 64)
    deviation = found.double().std(dim=0)
    # Batch norm's affine map and the last batches' statistics move them a little; none is dead, none rules.
    assert deviation.min() > 0.3
    assert deviation.max() < 3


@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 5, 9), (1, 28, 28), (3, 64, 64)])
def test_any_shape(shape: tuple[int, int, int]) -> None:
    network = features.Classifier(shape, 7)
    x = torch.rand(5, *shape)
    assert network.features(x).shape == (5, features.Classifier.feature_dim)
    assert network(x).shape == (5, 7)


def test_the_seed_alone_decides(compose_params: Compose) -> None:
    settings = replace(compose_params().features, steps=5, batch_size=8)
    rng = np.random.default_rng(0)
    x, labels = rng.integers(0, 256, (20, 3, 6, 6), dtype=np.uint8), rng.integers(0, 4, 20)

    def weights(seed: int) -> torch.Tensor:
        network = features.train_classifier(x, labels, 4, replace(settings, seed=seed))
        return torch.cat([parameter.flatten() for parameter in network.parameters()])

    torch.manual_seed(1)
    first = weights(0)
    threads = torch.get_num_threads()
    torch.manual_seed(2)
    torch.set_num_threads(threads + 1)
    assert torch.equal(weights(0), first)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert not torch.equal(weights(1), first)


def test_every_row_comes_once_before_one_comes_twice() -> None:
    order = features.data_order(10, 7, 4, torch.Generator().manual_seed(0))
    assert order.shape == (7, 4)
    flat = order.flatten().tolist()
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10))
    assert flat[:10] != flat[10:20]


def test_a_diverging_loss_stops_the_stage(compose_params: Compose) -> None:
    settings = replace(compose_params().features, steps=20, batch_size=8, learning_rate=1e30)
    x = np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    with pytest.raises(StageError, match=r"the classifier's loss is \S+ at step \d+: lower features.learning_rate=1e"):
        features.train_classifier(x, np.arange(20) % 2, 2, settings)


@pytest.mark.usefixtures("workdir")
def test_without_labels_nothing_is_trained(compose_params: Compose, caplog: pytest.LogCaptureFixture) -> None:
    params = compose_params("data=patches", "data.resolution=64")
    prepare.main(params)
    with caplog.at_level(logging.WARNING, "pipeline"):
        features.main(params)
    assert "patches has no labels: no classifier is trained" in caplog.text
    assert features.manifest() == {"labelled": False}
    assert [path.name for path in features.OUT.iterdir()] == ["classifier.json"]


@pytest.mark.usefixtures("workdir")
def test_missing_files_are_named() -> None:
    with pytest.raises(StageError, match=r"out/features/classifier.json does not exist: write it with `dvc repro"):
        _extractors.classifier()


@pytest.mark.usefixtures("trained")
def test_torch_fidelity_uses_it_by_name() -> None:
    extractor = _extractors.classifier()
    for _ in range(2):  # again is no error
        _fidelity.register(extractor.name)
    train, test = (prepare.load(split)[0][:100] for split in ("train", "test"))
    metrics = torch_fidelity.calculate_metrics(
        input1=Pictures(test),
        input2=Pictures(train),
        feature_extractor="digits-classifier",
        feature_extractor_weights_path=str(extractor.weights),
        cuda=False,
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        kid_subset_size=50,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert metrics[torch_fidelity.KEY_METRIC_ISC_MEAN] > 3  # of 10 classes
    assert metrics[torch_fidelity.KEY_METRIC_FID] > 0


@pytest.mark.usefixtures("trained")
def test_the_extractor_sees_the_channels_the_classifier_was_trained_on() -> None:
    extractor, (x, _) = _extractors.classifier(), prepare.load("test")
    _fidelity.register(extractor.name)
    made = create_feature_extractor(
        extractor.name,
        ["logits", "features"],
        cuda=False,
        feature_extractor_weights_path=extractor.weights,
        verbose=False,
    )
    grey = torch.from_numpy(np.array(x[:5]))
    logits, rows = made(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(rows, made.layers.network.features(grey / 255))
    torch.testing.assert_close(logits, made.layers.network(grey / 255))
    assert not made.training


def test_other_weights_are_refused(trained: Path, tmp_path: Path) -> None:
    folder = copy(trained / features.OUT, tmp_path / "features")
    weights = folder / "classifier.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(StageError, match=rf"SHA-256 {sha256(weights)}, expected {'.' * 64}: .* anew"):
        _extractors.classifier(folder).open()


def test_another_sets_classifier_is_refused(trained: Path) -> None:
    _fidelity.register("fashion_mnist-classifier")
    with pytest.raises(StageError, match="is of 'digits-classifier', expected 'fashion_mnist-classifier'"):
        create_feature_extractor(
            "fashion_mnist-classifier",
            ["features"],
            cuda=False,
            feature_extractor_weights_path=features.OUT / "classifier.safetensors",
            verbose=False,
        )


def test_json_is_read_as_it_is(trained: Path) -> None:
    assert features.manifest() == read_json(trained / "out/features/classifier.json")
