"""Noise levels and Langevin steps: ladders, step rules, Techniques 1, 2 and 4 of Song & Ermon (2020), arXiv:2006.09011.

Legend: sigma_1 > ... > sigma_L the noise levels in pixel units of images in [0, 1], index 0 the largest; gamma the
ratio of neighbours; D the dimension of an image, C H W; T the Langevin steps at one level.

A step rule, `rule(sigma, s, z)`, gives the size alpha of the step x <- x + alpha s + sqrt(2 alpha) z at the level sigma
from the score s and the noise z, both of shape (B, ...): a number, or a size for each image, shape (B, 1, ...).
"""

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

StepRule = Callable[[float, Tensor, Tensor], float | Tensor]

PAIRWISE_LIMIT = 60_000  # above this many images Technique 1 looks at a sample of them
PAIRWISE_SAMPLE = 10_000


def geometric_sigmas(sigma_1: float, sigma_L: float, L: int) -> Tensor:
    """The geometric ladder, sigma_i = sigma_1 (sigma_L / sigma_1)^((i - 1) / (L - 1)) (arXiv:1907.05600, section 4.1).

    Args:
        sigma_1: Largest level, pixel units.
        sigma_L: Smallest level, 0 < sigma_L < sigma_1.
        L: Number of levels, at least 2.

    Returns:
        Levels, shape (L,), float64, strictly decreasing.

    Raises:
        ValueError: If an argument is out of its range.
    """
    _check_ladder(sigma_1, sigma_L, L)
    return torch.linspace(math.log(sigma_1), math.log(sigma_L), L, dtype=torch.float64).exp()


def linear_sigmas(sigma_1: float, sigma_L: float, L: int) -> Tensor:
    """Equally spaced levels from sigma_1 down to sigma_L; arguments, result and errors as `geometric_sigmas`."""
    _check_ladder(sigma_1, sigma_L, L)
    return torch.linspace(sigma_1, sigma_L, L, dtype=torch.float64)


def given_sigmas(values: Sequence[float] | Tensor) -> Tensor:
    """The ladder with just these levels.

    Args:
        values: sigma_1 > ... > sigma_L > 0, at least one, finite.

    Returns:
        Levels, shape (L,), float64.

    Raises:
        ValueError: If the values are no such levels.
    """
    if isinstance(values, Tensor):
        sigmas = values.detach().double()
    else:  # on the CPU even where networks are built on another device
        sigmas = torch.tensor(values, dtype=torch.float64, device="cpu")
    if (
        sigmas.ndim != 1
        or len(sigmas) == 0
        or not (sigmas[0] < math.inf and sigmas[-1] > 0 and (sigmas.diff() < 0).all())
    ):
        raise ValueError(f"expected finite sigmas that decrease strictly to a positive value, got {sigmas.tolist()}")
    return sigmas


def edm_sigmas(sigma_1: float, sigma_L: float, L: int, rho: float = 7.0) -> Tensor:
    """Equally spaced in sigma^(1 / rho), which makes the local errors of an ODE solver's steps alike.

    sigma_i = (sigma_1^(1/rho) + (i - 1) / (L - 1) (sigma_L^(1/rho) - sigma_1^(1/rho)))^rho (arXiv:2206.00364, eq. 5).

    Args:
        sigma_1: Largest level, pixel units.
        sigma_L: Smallest level, 0 < sigma_L < sigma_1.
        L: Number of levels, at least 2.
        rho: 1 is linear, infinity geometric.

    Returns:
        Levels, shape (L,), float64, strictly decreasing.

    Raises:
        ValueError: If an argument is out of its range.
    """
    _check_ladder(sigma_1, sigma_L, L)
    if not 0 < rho < math.inf:
        raise ValueError(f"expected 0 < rho < inf, got {rho}")
    return torch.linspace(sigma_1 ** (1 / rho), sigma_L ** (1 / rho), L, dtype=torch.float64) ** rho


def refined(sigmas: Sequence[float] | Tensor, steps: int) -> Tensor:
    """The ladder with steps - 1 levels more between neighbours, in geometric progression: (L - 1) steps + 1 levels.

    Args:
        sigmas: Noise levels, shape (L,), strictly decreasing.
        steps: From each level to the next, >= 1.

    Raises:
        ValueError: If the levels do not strictly decrease or steps < 1.
    """
    if steps < 1:
        raise ValueError(f"expected steps >= 1, got {steps}")
    logs = given_sigmas(sigmas).log()
    part = torch.arange(steps, dtype=torch.float64) / steps
    between = logs[:-1, None] + (logs[1:] - logs[:-1])[:, None] * part
    return torch.cat([between.flatten(), logs[-1:]]).exp()


def langevin_step_sizes(sigmas: Tensor, epsilon: float) -> Tensor:
    """Step size of each level, alpha_i = epsilon (sigma_i / sigma_L)^2, shape and dtype of `sigmas`.

    The convention is the official code's and the 2020 paper's, x <- x + alpha s + sqrt(2 alpha) z; Algorithm 1 of the
    2019 paper writes alpha / 2 and sqrt(alpha).

    Raises:
        ValueError: If epsilon is not positive or the levels do not strictly decrease to a positive one.
    """
    _check_epsilon(epsilon)
    given_sigmas(sigmas)
    return epsilon * (sigmas / sigmas[-1]) ** 2


def epsilon_rule(epsilon: float, sigma_L: float) -> StepRule:
    """The papers' step rule, alpha = epsilon (sigma / sigma_L)^2: `langevin_step_sizes`, one level at a time.

    Raises:
        ValueError: If epsilon or sigma_L is not positive.
    """
    _check_epsilon(epsilon)
    if not 0 < sigma_L < math.inf:
        raise ValueError(f"expected 0 < sigma_L < inf, got {sigma_L}")
    return lambda sigma, s, z: epsilon * (sigma / sigma_L) ** 2


def snr_rule(r: float) -> StepRule:
    """Step sizes that hold the signal-to-noise ratio of each image's step, alpha = 2 (r ||z|| / ||s||)^2.

    The corrector of arXiv:2011.13456, Algorithm 4, with the norms of each image where the official code takes their
    means over the batch, so that an image does not depend on the others of its batch. Where s = 0 no step has the
    ratio; alpha is 2 (r sigma)^2 there, its value for s = -z / sigma.

    Args:
        r: Of ||alpha s|| to ||sqrt(2 alpha) z||, > 0; sqrt(epsilon / 2) / sigma_L answers to the rule of epsilon.

    Raises:
        ValueError: If r is not positive.
    """
    _check_ratio(r)

    def rule(sigma: float, s: Tensor, z: Tensor) -> Tensor:
        axes = tuple(range(1, s.ndim))
        norm, noise = (torch.linalg.vector_norm(value, dim=axes, keepdim=True) for value in (s, z))
        return 2 * (r * torch.where(norm > 0, noise / norm, sigma)) ** 2

    return rule


def batch_snr_rule(r: float) -> StepRule:
    """`snr_rule` as the official code of arXiv:2011.13456 has it: with the means over the batch of both norms.

    An image depends on the others of its batch then: for comparisons with that code, not for the pipeline.

    Raises:
        ValueError: If r is not positive.
    """
    _check_ratio(r)

    def rule(sigma: float, s: Tensor, z: Tensor) -> Tensor:
        norm, noise = (value.flatten(1).norm(dim=1).mean() for value in (s, z))
        return 2 * (r * noise / norm) ** 2

    return rule


def annealed_rule(r: float) -> StepRule:
    """alpha = 2 (r sigma)^2, the annealed Langevin corrector of arXiv:2011.13456: `epsilon_rule` of 2 (r sigma_L)^2.

    Raises:
        ValueError: If r is not positive.
    """
    _check_ratio(r)
    return epsilon_rule(2 * r**2, 1.0)


def suggest_sigma_1(images: Tensor, to_space: Callable[[Tensor], Tensor] = torch.positive) -> float:
    """Technique 1: the largest Euclidean distance between two training images.

    Then a chain at sigma_1 can cross between any two images: the mixture's responsibilities are bounded by
    E[r_j] <= exp(-||x_i - x_j||^2 / (8 sigma_1^2)) / 2. With more than 60,000 images the maximum is over 10,000 of
    them (so the paper), drawn with a fixed seed, and the log says so; the cost is O(N^2 D).

    Args:
        images: Training images, shape (N, ...), N >= 2, float in [0, 1], or uint8, of which v counts as v / 255.
        to_space: From [0, 1] to where distances are taken, such as `images.to_logits`.

    Returns:
        sigma_1, pixel units, or those of the space.

    Raises:
        ValueError: If there are fewer than 2 images or all are equal.
    """
    if len(images) < 2:
        raise ValueError(f"expected at least 2 images, got {len(images)}")
    if len(images) > PAIRWISE_LIMIT:
        log.info("Technique 1: the largest distance among %d of %d images", PAIRWISE_SAMPLE, len(images))
        generator = torch.Generator().manual_seed(0)
        images = images[torch.randperm(len(images), generator=generator)[:PAIRWISE_SAMPLE]]
    x = to_space(images.flatten(1).float() / (255 if images.dtype == torch.uint8 else 1))
    x = x - x.mean(0)  # distances stay, round-off shrinks
    square = x.square().sum(1)
    best, pair, block = -1.0, (0, 0), 2048
    for i in range(0, len(x), block):
        for j in range(i, len(x), block):
            a, b = slice(i, i + block), slice(j, j + block)
            distance = square[a, None] + square[None, b] - 2 * x[a] @ x[b].T
            top = int(distance.argmax())
            if (value := float(distance.view(-1)[top])) > best:
                best, pair = value, (i + top // distance.shape[1], j + top % distance.shape[1])
    sigma_1 = float((x[pair[0]].double() - x[pair[1]].double()).norm())
    if sigma_1 == 0:
        raise ValueError("expected images that differ, got identical ones")
    return sigma_1


def overlap(gamma: float, dim: int) -> float:
    """The mass C that neighbouring levels share (Technique 2); the radius of noise is near N(sqrt(D) sigma, sigma^2/2).

    C = Phi(sqrt(2 D) (gamma - 1) + 3 gamma) - Phi(sqrt(2 D) (gamma - 1) - 3 gamma), from 0.9973 at gamma = 1 towards 0.

    Args:
        gamma: sigma_{i-1} / sigma_i, >= 1.
        dim: D = C H W.
    """
    shift = math.sqrt(2 * dim) * (gamma - 1)
    # erfc of the lower tail keeps the small values that a difference of two numbers near 1 would lose
    return (math.erfc((shift - 3 * gamma) / math.sqrt(2)) - math.erfc((shift + 3 * gamma) / math.sqrt(2))) / 2


def suggest_gamma(dim: int, overlap_target: float = 0.5) -> float:
    """Technique 2: the ratio gamma = sigma_{i-1} / sigma_i at which neighbouring levels share `overlap_target`.

    Args:
        dim: D = C H W.
        overlap_target: C, between 0 and the overlap at gamma = 1 (0.9973).

    Raises:
        ValueError: If an argument is out of its range.
    """
    if dim < 1 or not 0 < overlap_target < overlap(1, dim):
        raise ValueError(f"expected dim >= 1 and 0 < overlap < {overlap(1, dim):.4f}, got {dim} and {overlap_target}")
    low, high = 1.0, 2.0
    while overlap(high, dim) > overlap_target:
        high *= 2
    while high - low > 1e-14 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if overlap(middle, dim) > overlap_target else (low, middle)
    return low


def suggest_levels(sigma_1: float, sigma_L: float, dim: int, overlap: float = 0.5) -> int:
    """Technique 2: how many geometric levels from sigma_1 to sigma_L share the mass `overlap` with their neighbours.

    L = 1 + log(sigma_1 / sigma_L) / log(gamma), rounded; gamma from `suggest_gamma`.

    Raises:
        ValueError: If an argument is out of its range.
    """
    _check_ladder(sigma_1, sigma_L, 2)
    return max(2, round(1 + math.log(sigma_1 / sigma_L) / math.log(suggest_gamma(dim, overlap))))


def variance_ratio(u: Tensor, gamma: float, steps_per_level: int) -> Tensor:
    """s_T^2 / sigma_i^2: the variance that T Langevin steps leave at a level, over the level's own (Proposition 3).

    (1 - u)^(2 T) (gamma^2 - b) + b with b = 2 / (2 - u), for u = epsilon / sigma_L^2 in (0, 2); the same at each level.

    Args:
        u: Any shape, which the result has too.
        gamma: sigma_{i-1} / sigma_i.
        steps_per_level: T.
    """
    b = 2 / (2 - u)
    return (1 - u) ** (2 * steps_per_level) * (gamma**2 - b) + b


def suggest_epsilon(sigmas: Tensor, steps_per_level: int) -> float:
    """Technique 4: the epsilon whose T steps a level bring the variance nearest to the level's own.

    argmin over 0 < epsilon < 2 sigma_L^2 of |s_T^2 / sigma_i^2 - 1|, by a grid and a finer grid around its best point.
    For a ladder that is not geometric gamma is the geometric mean of its ratios.

    Args:
        sigmas: Levels, shape (L,), L >= 2, strictly decreasing.
        steps_per_level: T >= 1.

    Returns:
        epsilon, pixel units squared.

    Raises:
        ValueError: If the levels do not strictly decrease to a positive one, there are fewer than 2, or T < 1.
    """
    levels = given_sigmas(sigmas)
    if len(levels) < 2 or steps_per_level < 1:
        raise ValueError(f"expected at least 2 sigmas and 1 step a level, got {len(levels)} and {steps_per_level}")
    gamma = float(levels[0] / levels[-1]) ** (1 / (len(levels) - 1))
    low, high = 0.0, 2.0
    for _ in range(4):
        u = torch.linspace(low, high, 10_001, dtype=torch.float64)[1:-1]
        best = int((variance_ratio(u, gamma, steps_per_level) - 1).abs().argmin())
        width = float(u[1] - u[0])
        low, high = float(u[best]) - width, float(u[best]) + width
    return float(u[best]) * float(levels[-1]) ** 2


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < math.inf:
        raise ValueError(f"expected epsilon > 0, got {epsilon}")


def _check_ratio(r: float) -> None:
    if not 0 < r < math.inf:
        raise ValueError(f"expected 0 < r < inf, got {r}")


def _check_ladder(sigma_1: float, sigma_L: float, L: int) -> None:
    if not 0 < sigma_L < sigma_1 < math.inf:
        raise ValueError(f"expected 0 < sigma_L < sigma_1, got sigma_L={sigma_L}, sigma_1={sigma_1}")
    if L < 2:
        raise ValueError(f"expected L >= 2, got {L}")
