"""Bytes and numbers."""

import torch

from ncsn import images


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
