"""Images as bytes and as numbers, transforms of them, and grids.

The transforms are those of the 2020 code, in its order: dequantise, then either `centre` or `to_logits`. Their draws
are arguments.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]: v / 255."""
    return images.float() / 255


def to_uint8(images: Tensor) -> Tensor:
    """Float images to uint8: clamped to [0, 1], rounded to the nearest of 256 levels, halves up (0.5 -> 128)."""
    return (images.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def dequantise(x: Tensor, u: Tensor) -> Tensor:
    """Uniform dequantisation, (255 x + u) / 256: spreads each of 256 levels over its bin; u uniform in [0, 1)."""
    return x * (255 / 256) + u / 256


def dequantise_normal(x: Tensor, z: Tensor) -> Tensor:
    """Gaussian dequantisation, x + 0.01 z; z standard normal."""
    return x + 0.01 * z


def centre(x: Tensor) -> Tensor:
    """From [0, 1] to [-1, 1]: 2 x - 1."""
    return 2 * x - 1


def uncentre(y: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1], the inverse of `centre`: (y + 1) / 2."""
    return (y + 1) / 2


def to_logits(x: Tensor, lam: float = 1e-6) -> Tensor:
    """The logit transform: log(u / (1 - u)) with u = lam + (1 - 2 lam) x, finite for x in [0, 1]."""
    u = lam + (1 - 2 * lam) * x
    return u.log() - (-u).log1p()


def from_logits(y: Tensor) -> Tensor:
    """The sigmoid. As in the official code it gives back u, which is within lam of x."""
    return y.sigmoid()


SPACES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "pixels": (torch.positive, torch.positive),
    "centred": (centre, uncentre),
    "logits": (to_logits, from_logits),
}  # what the network of a checkpoint was trained on: from pixels in [0, 1], and back


def flip(x: Tensor, u: Tensor) -> Tensor:
    """Mirror left and right each image with u < 0.5; x of shape (B, C, H, W), u uniform in [0, 1), shape (B,)."""
    return torch.where((u < 0.5)[:, None, None, None], x.flip(-1), x)


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
