"""Nearest training images, and whether copies are found out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import _neighbours


def _images(n: int, seed: int) -> np.ndarray:
    """Smooth random images: neighbours of another draw are far, a mirror image is another image."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 3, 4, 4), dtype=np.uint8)
    return coarse.repeat(2, axis=2).repeat(2, axis=3)


@pytest.mark.parametrize("block", [1, 2**22])
def test_they_are_those_of_brute_force_mirrored_or_not(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(_neighbours, "BLOCK", block)
    x, data = _images(7, 0), _images(50, 1)
    x[2], x[3] = data[40], data[41][..., ::-1]
    found = _neighbours.nearest(x, x[..., ::-1], data, np.arange(50))
    a, b = (np.sqrt(((each[:, None].astype(float) - data[None]) ** 2).sum((2, 3, 4))) for each in (x, x[..., ::-1]))
    distance = np.minimum(a, b)
    order = np.argsort(distance, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(found.index, order)
    np.testing.assert_allclose(found.distance, np.take_along_axis(distance, order, 1), rtol=1e-12)
    assert found.distance[2, 0] == found.distance[3, 0] == 0
    assert (found.index[2, 0], found.index[3, 0]) == (40, 41)


def test_of_many_images_those_that_are_kept_count() -> None:
    x, data = _images(3, 0), _images(50, 1)
    kept = np.array([4, 9, 33])
    found = _neighbours.nearest(x, x, data, kept)
    assert found.index.shape == (3, 3)
    assert set(found.index[0]) == {4, 9, 33}
    rows = _neighbours.nearest(x, x, data[kept], kept, rows=True)
    np.testing.assert_array_equal(rows.index, found.index)


def test_copies_are_found_out_and_new_images_are_not(caplog: pytest.LogCaptureFixture) -> None:
    data, test = _images(500, 0), _images(300, 1)
    copies = _images(200, 2)
    copies[:30] = data[50:80]
    copies[30:60] = data[90:120][..., ::-1]
    honest = _neighbours.in_pixels(_images(200, 3), test, data, np.arange(500))
    assert honest.near < _neighbours.SUSPICIOUS
    honest.warn()
    assert not caplog.text
    copied = _neighbours.in_pixels(copies, test, data, np.arange(500))
    assert 0.3 <= copied.near < 0.35
    copied.warn()
    assert "of the samples are nearer to a training image, in pixels, than the nearest 1 % of held-out" in caplog.text

    def features(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x[:, 0, ::2, ::2].reshape(len(x), -1).astype(np.float32))

    found = {
        name: features(x)
        for name, x in {
            "samples": copies,
            "samples_mirrored": copies[..., ::-1],
            "test": test,
            "test_mirrored": test[..., ::-1],
        }.items()
    }
    in_features = _neighbours.in_features(found, features(data), np.arange(500))
    assert in_features.near >= 0.3
    assert in_features.samples.index[40, 0] == 100


def test_pictures_of_few_images_can_be_drawn(tmp_path: Path) -> None:
    data = _images(9, 0)
    finding = _neighbours.in_pixels(_images(2, 1), _images(3, 2), data, np.arange(9))
    _neighbours.picture({"samples": _images(2, 1), "test": _images(3, 2)}, data, [finding], tmp_path / "a.png")
    _neighbours.plot([finding], tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert (tmp_path / "b.png").stat().st_size > 1000
