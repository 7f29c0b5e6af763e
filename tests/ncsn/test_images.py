"""Bytes and numbers, the transforms of the official code, grids."""

from pathlib import Path

import pytest
import torch

from ncsn import images

GOLDEN = Path(__file__).parent.parent / "golden"

FORWARD = {
    "uniform_dequantization": images.dequantise,
    "gaussian_dequantization": images.dequantise_normal,
    "rescaled": images.centre,
    "logit_transform": images.to_logits,
}
INVERSE = {"rescaled": images.uncentre, "logit_transform": images.from_logits}


def test_bytes_survive_the_round_trip():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(images.to_uint8(images.to_float(values)), values)


def test_rounding_goes_to_the_nearest_and_clamps():
    x = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.7, 0.49 / 255, 0.51 / 255])
    assert images.to_uint8(x).tolist() == [0, 0, 128, 255, 255, 0, 1]


def test_grid_places_images_row_by_row():
    tiles = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 3)
    canvas = images.grid(tiles, 3)
    assert canvas.shape == (1, 7, 13)
    assert canvas[0, 1:3, 1:4].unique().tolist() == [0]
    assert canvas[0, 4:6, 5:8].unique().tolist() == [4]
    assert canvas[0, 4:6, 9:12].unique().tolist() == [255]
    assert canvas[0, 0].unique().tolist() == [255]


@pytest.mark.parametrize(
    "case", ["none", "uniform", "gaussian", "rescaled", "logit", "uniform_logit", "uniform_rescaled"]
)
def test_transforms_of_the_official_code(case):
    golden = torch.load(GOLDEN / "transforms.pt", weights_only=True)[case]
    x, draws = golden["x"], list(golden["draws"])
    for option in FORWARD:
        if golden["options"].get(option):
            x = FORWARD[option](x, draws.pop(0)) if "dequantization" in option else FORWARD[option](x)
    assert not draws
    torch.testing.assert_close(x, golden["forward"], rtol=1e-6, atol=1e-6)
    for option in INVERSE:
        if golden["options"].get(option):
            x = INVERSE[option](x)
    torch.testing.assert_close(x.clamp(0, 1), golden["inverse"], rtol=1e-6, atol=1e-7)


def test_dequantised_bytes_stay_in_their_bins():
    x = torch.arange(256, dtype=torch.float64) / 255
    for u in (0.0, 0.5, 1 - 2**-24):
        y = images.dequantise(x, torch.full((256,), u).double())
        torch.testing.assert_close(y * 256, torch.arange(256) + torch.tensor(u).double(), rtol=1e-12, atol=1e-12)


def test_inverses_undo_their_transforms():
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(images.uncentre(images.centre(x)), x, rtol=1e-15, atol=1e-15)
    for lam in (1e-6, 0.05):
        y = images.to_logits(x, lam)
        assert y.isfinite().all()
        torch.testing.assert_close(y, -y.flip(0))  # odd about one half
        torch.testing.assert_close(images.from_logits(y), lam + (1 - 2 * lam) * x)


def test_flip_mirrors_the_images_drawn_below_one_half():
    x = torch.arange(3 * 2 * 2 * 3).view(3, 2, 2, 3).float()
    y = images.flip(x, torch.tensor([0.49, 0.5, 0.0]))
    assert torch.equal(y[0], x[0].flip(-1))
    assert torch.equal(y[1], x[1])
    assert torch.equal(y[2], x[2].flip(-1))
    assert torch.equal(images.flip(y, torch.tensor([0.49, 0.5, 0.0])), x)
