"""Counter-based random numbers: a value is a function of (seed, stream, index, step, element), of nothing else.

So image i gets the same noise in any batch, on any worker, in any order, and a run that resumes needs no generator's
state. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), in
integer tensor arithmetic that every device computes alike.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Streams: what the numbers are for, so that no two uses of one seed share them.
# The numbers stay: new streams go to the end.
STEP, START, TRAIN_NOISE, TRAIN_LEVEL, TRAIN_FLIP, KNOWN, OTHER_END = range(7)
TRAIN_DIRECTION, TRAIN_DEQUANTISE, TRAIN_ORDER, TRAIN_DROPOUT = range(7, 11)
DEQUANTISE, PROBE = range(11, 13)  # of likelihoods

_MASK = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random 32-bit words from four counter words and two key words.

    Args:
        counter: Four int64 tensors of broadcastable shapes that hold values in [0, 2^32).
        key: Two numbers in [0, 2^32).

    Returns:
        Four int64 tensors that hold values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps, the 64 bits are right
        c0, c1 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def words(seed: int, stream: int, index: Tensor, step: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words for each of ceil(n / 4) elements of each index: four int64 tensors of shape (B, ceil(n / 4)).

    Args:
        seed: In [0, 2^32).
        stream: What the numbers are for, in [0, 2^32).
        index: Image or sample numbers, int64, shape (B,), in [0, 2^63).
        step: Draw number, in [0, 2^32).
        n: Values wanted for each index.

    Raises:
        ValueError: If seed or step is out of its range.
    """
    if not (0 <= seed <= _MASK and 0 <= step <= _MASK):
        raise ValueError(f"expected seed and step in [0, 2^32), got seed={seed}, step={step}")
    element = torch.arange((n + 3) // 4, device=index.device)[None]
    i = index[:, None]
    return philox((element, i & _MASK, i >> 32, torch.full_like(element, step)), (seed, stream))


def uniform(seed: int, stream: int, index: Tensor, step: int, shape: Sequence[int]) -> Tensor:
    """Uniform values in [0, 1), multiples of 2^-24, float32, shape (B, *shape); arguments and errors as `words`."""
    n = math.prod(shape)
    u = torch.stack(torch.broadcast_tensors(*words(seed, stream, index, step, n)), -1).flatten(1)[:, :n]
    return (u >> 8).float().mul_(2.0**-24).reshape(-1, *shape)


def normal(seed: int, stream: int, index: Tensor, step: int, shape: Sequence[int]) -> Tensor:
    """Standard normal values by the Box-Muller transform, float32, shape (B, *shape); arguments and errors as `words`.

    From two uniforms u, v: sqrt(-2 log(1 - u)) times cos and sin of 2 pi v; with 24 bits |z| <= 5.77.
    """
    n = math.prod(shape)
    a, b, c, d = ((w >> 8).float().mul_(2.0**-24) for w in words(seed, stream, index, step, n))
    r, s = (-2 * torch.log1p(-a)).sqrt_(), (-2 * torch.log1p(-c)).sqrt_()
    b, d = b * (2 * math.pi), d * (2 * math.pi)
    z = torch.stack((r * b.cos(), r * b.sin(), s * d.cos(), s * d.sin()), -1)
    return z.flatten(1)[:, :n].reshape(-1, *shape)


def signs(seed: int, stream: int, index: Tensor, step: int, shape: Sequence[int]) -> Tensor:
    """Rademacher values, -1 or 1 with the same probability, float32, shape (B, *shape); arguments as `words`."""
    return torch.where(uniform(seed, stream, index, step, shape) < 0.5, -1.0, 1.0)


def seeded_noise(seed: int, index: Tensor, stream: int = STEP) -> Callable[[Tensor, int], Tensor]:
    """The `noise(x, step)` of a sampler: row b is a function of (seed, stream, index[b], step) alone.

    Args:
        seed: In [0, 2^32).
        index: Image numbers, int64, shape (B,), on the device of x. Rows with the same number get the same noise.
        stream: STEP for the steps, KNOWN for known parts, OTHER_END for the far end of an interpolation.
    """

    def noise(x: Tensor, step: int) -> Tensor:
        return normal(seed, stream, index, step, x.shape[1:]).to(x.dtype)

    return noise


def start_images(seed: int, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Where the chains start: uniform in [0, 1), as in the official code; float32, shape (B, *shape)."""
    return uniform(seed, START, index, 0, shape)


def noisy_images(seed: int, index: Tensor, images: Tensor, sigma_1: float) -> Tensor:
    """Chains that start from data at the largest noise level: images + sigma_1 z, shape and dtype of the images."""
    return images + sigma_1 * normal(seed, START, index, 0, images.shape[1:]).to(images.dtype)
