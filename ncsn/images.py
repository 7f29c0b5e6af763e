"""Images as bytes and as numbers, and grids of them."""

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]: v / 255."""
    return images.float() / 255


def to_uint8(images: Tensor) -> Tensor:
    """Float images to uint8: clamped to [0, 1], rounded to the nearest of 256 levels, halves up (0.5 -> 128)."""
    return (images.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def grid(images: Tensor, columns: int, *, pad: int = 1) -> Tensor:
    """Tile images row by row into one, with white lines of `pad` pixels between and around them.

    Args:
        images: uint8, shape (N, C, H, W).
        columns: Images in a row, >= 1.
        pad: Width of the lines.

    Returns:
        uint8, shape (C, height, width); places without an image are white.
    """
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    canvas = images.new_full((channels, rows * (height + pad) + pad, columns * (width + pad) + pad), 255)
    for k, image in enumerate(images):
        top, left = pad + k // columns * (height + pad), pad + k % columns * (width + pad)
        canvas[:, top : top + height, left : left + width] = image
    return canvas
