"""Samplers: a start in, samples out; randomness, constraints and observation are arguments.

`noise(x, step)` returns standard normal values shaped like x for draw number `step` = 0, 1, ... of the whole
trajectory: `ncsn.random.seeded_noise` makes one, `interpolated` mixes two.
`project(x, sigma, step)` returns x with what is known about it put in, at the noise level sigma. It is called before
each step, and once more after the last one with that step's sigma and number: so the final denoising step, or where
there is none the result, is projected too. `inpainting` and `colourisation` make one.
`observe(x, step, sigma)` is called after each step.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ncsn.losses import Score
from ncsn.noise import StepRule, epsilon_rule, given_sigmas

Noise = Callable[[Tensor, int], Tensor]
Project = Callable[[Tensor, float, int], Tensor]
Observe = Callable[[Tensor, int, float], None]


def torch_noise(x: Tensor, step: int) -> Tensor:
    """Noise from torch's global generator."""
    return torch.randn_like(x)


@torch.no_grad()
def langevin(
    score: Score,
    x: Tensor,
    *,
    epsilon: float,
    steps: int,
    sigma: float,
    noise: Noise = torch_noise,
    observe: Observe | None = None,
) -> Tensor:
    """Draw samples by Langevin dynamics with a constant step, x <- x + epsilon s(x, sigma) + sqrt(2 epsilon) z.

    arXiv:1907.05600, equation 4, where epsilon is twice as large: x + epsilon / 2 s + sqrt(epsilon) z.

    Args:
        score: s(x, sigma).
        x: Start, shape (B, ...).
        epsilon: Step size, pixel units squared, > 0.
        steps: T >= 1.
        sigma: Noise level that the score is told, pixel units. There is no default, though plain Langevin dynamics has
            no levels: every score takes one. 0 is the data's own score, which an exact score has; a network that is
            conditioned on noise, or divides by sigma, needs one of its levels.
        noise: Standard normal values, see the module.
        observe: Watches; must not change x.

    Returns:
        Samples, shape and dtype of x.

    Raises:
        ValueError: If epsilon is not positive or T < 1.
    """
    if not (epsilon > 0 and steps >= 1):
        raise ValueError(f"expected epsilon > 0 and steps >= 1, got {epsilon} and {steps}")
    return _steps(score, x, sigma, range(steps), lambda *_: epsilon, noise, None, observe)


@torch.no_grad()
def annealed_langevin(
    score: Score,
    x: Tensor,
    sigmas: Tensor,
    *,
    epsilon: float | None = None,
    steps_per_level: int,
    denoise: bool = True,
    step_rule: StepRule | None = None,
    noise: Noise = torch_noise,
    project: Project | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Draw samples by annealed Langevin dynamics (arXiv:1907.05600, Algorithm 1; step convention of the official code).

    At each sigma_i, T times: x <- x + alpha s(x, sigma_i) + sqrt(2 alpha) z, with alpha = epsilon (sigma_i / sigma_L)^2
    or of another step rule.
    At the end, with `denoise`: x <- x + sigma_L^2 s(x, sigma_L), the posterior mean (arXiv:2006.09011, Algorithm 1).

    Args:
        score: s(x, sigma).
        x: Start, shape (B, ...); uniform in [0, 1] in the papers.
        sigmas: Noise levels, shape (L,), strictly decreasing, pixel units.
        epsilon: Step size at the last level, pixel units squared, > 0.
        steps_per_level: T >= 1.
        denoise: Take the final denoising step.
        step_rule: In place of epsilon; see `ncsn.noise`.
        noise: Standard normal values, see the module.
        project: Puts in what is known, see the module.
        observe: Watches; must not change x.

    Returns:
        Samples, shape and dtype of x. They are not clamped to [0, 1].

    Raises:
        ValueError: If the levels do not strictly decrease, epsilon is not positive, T < 1, or both or neither of
            epsilon and step_rule are given.
    """
    if steps_per_level < 1:
        raise ValueError(f"expected steps_per_level >= 1, got {steps_per_level}")
    levels = given_sigmas(sigmas).tolist()
    if epsilon is not None and step_rule is None:
        step_rule = epsilon_rule(epsilon, levels[-1])
    elif epsilon is not None or step_rule is None:
        raise ValueError(f"expected one of epsilon and step_rule, got {epsilon} and {step_rule}")
    for i, sigma in enumerate(levels):
        numbers = range(i * steps_per_level, (i + 1) * steps_per_level)
        x = _steps(score, x, sigma, numbers, step_rule, noise, project, observe)
    if project is not None:
        x = project(x, sigma, numbers[-1])
    return x + sigma**2 * score(x, _level(x, sigma)).to(x.dtype) if denoise else x


@torch.no_grad()
def consistent_annealed_langevin(
    score: Score,
    x: Tensor,
    sigmas: Tensor,
    *,
    epsilon: float,
    denoise: bool = True,
    noise: Noise = torch_noise,
    project: Project | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Draw samples by consistent annealed sampling (arXiv:2009.05475, Algorithm 2).

    Once for each i < L, with eta = epsilon / sigma_L^2:

        x <- x + eta sigma_i^2 s(x, sigma_i) + beta_i sigma_{i+1} z,  beta_i^2 = 1 - ((1 - eta) sigma_i / sigma_{i+1})^2

    The step takes away the share eta of the noise that is in x, (1 - eta) sigma_i is left, and z fills it up to
    sigma_{i+1}: if x starts as data plus sigma_1 z, it is at the noise level that the score is told at each step, which
    with annealed Langevin dynamics it never quite is. At the end, with `denoise`: x <- x + sigma_L^2 s(x, sigma_L).

    Args:
        score: s(x, sigma).
        x: Start at noise level sigma_1, shape (B, ...).
        sigmas: Noise levels, shape (L,), strictly decreasing, pixel units; more steps are more levels, `noise.refined`.
        epsilon: Step size at the last level, pixel units squared; sigma_L^2 eta with 1 - sigma_{i+1} / sigma_i <= eta
            <= 1 for all i. At the lower end no noise is added, at the upper end all of it is new.
        denoise: Take the final denoising step.
        noise: Standard normal values, see the module.
        project: Puts in what is known, see the module.
        observe: Watches, is told the level that x has come to; must not change x.

    Returns:
        Samples, shape and dtype of x. They are not clamped to [0, 1].

    Raises:
        ValueError: If the levels do not strictly decrease or epsilon is out of that range.
    """
    levels = given_sigmas(sigmas).tolist()
    eta = epsilon / levels[-1] ** 2
    least = 1 - min(following / sigma for sigma, following in pairwise(levels))
    if not least * (1 - 1e-9) <= eta <= 1 + 1e-9:
        square = levels[-1] ** 2
        raise ValueError(
            f"expected epsilon from {least * square:.4g} to {square:.4g} for these levels (a share of sigma_L^2 from "
            f"{least:.4g} to 1), got {epsilon:.4g}; more levels lower the first of these"
        )
    for step, (sigma, following) in enumerate(pairwise(levels)):
        if project is not None:
            x = project(x, sigma, step)
        beta = max(0.0, 1 - ((1 - eta) * sigma / following) ** 2) ** 0.5
        s, z = score(x, _level(x, sigma)).to(x.dtype), noise(x, step)
        x = x + eta * sigma**2 * s + beta * following * z
        if observe is not None:
            observe(x, step, following)
    sigma = levels[-1]
    if project is not None:
        x = project(x, sigma, len(levels) - 1)
    return x + sigma**2 * score(x, _level(x, sigma)).to(x.dtype) if denoise else x


def inpainting(reference: Tensor, mask: Tensor, noise: Noise, *, steps_per_draw: int = 1) -> Project:
    """The `project` that keeps the known pixels of an image: x <- m (reference + sigma z) + (1 - m) x.

    With steps_per_draw = T this is Algorithm 2 of arXiv:1907.05600: one z for each level. (There the known part is
    pasted after each step; that is before the next, and a paste of the next level overwrites the last.) With 1 it is
    the 2020 code, a fresh z before each step. (What that code returns, not pasted at the end, is what `observe` sees
    last.) Without the denoising step the result's known part is reference + sigma_L z; that step adds sigma_L^2 s, as
    it does everywhere. `torch.where(mask, reference, result)` has the reference itself.

    Args:
        reference: Images in [0, 1], broadcastable to x.
        mask: True where the reference is known, bool, broadcastable to x.
        noise: z, of another stream than the steps' own: `seeded_noise(seed, index, random.KNOWN)`.
        steps_per_draw: Steps that share one draw; draw number k serves the steps k steps_per_draw and on.

    Raises:
        ValueError: If the mask is not bool or steps_per_draw < 1.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"expected a mask of bool, got {mask.dtype}: use mask > 0.5")
    return _known(lambda x, y: torch.where(mask, y, x), reference, noise, steps_per_draw)


def colourisation(grey: Tensor, noise: Noise, *, steps_per_draw: int = 1) -> Project:
    """The `project` that keeps the grey part of an image, the mean of its channels: x <- x + mean_C(y - x).

    Inpainting, of y = grey + sigma z, in an orthonormal basis of the channels whose first vector is (1, ..., 1) /
    sqrt(C), with that coordinate known (the idea of arXiv:2011.13456, appendix I.4).

    Args:
        grey: Images in [0, 1], shape (B, 1, H, W); of (B, C, H, W) the mean of the channels counts.
        noise: z, shaped like x; as in `inpainting`.
        steps_per_draw: As in `inpainting`.

    Raises:
        ValueError: If steps_per_draw < 1.
    """
    return _known(lambda x, y: x + (y - x).mean(1, keepdim=True), grey, noise, steps_per_draw)


def interpolated(p: Noise, q: Noise, angle: Tensor) -> Noise:
    """The `noise` of an interpolation: cos(angle) p + sin(angle) q, standard normal at each angle (arXiv:2006.09011).

    Chains that share start, p and q, with angles from 0 to pi / 2, end in images that lead from one to another.

    Args:
        p: Noise at the angle 0; rows of one interpolation get equal values, as of `seeded_noise` with equal numbers.
        q: Noise at the angle pi / 2, independent of p: `seeded_noise(seed, index, random.OTHER_END)`.
        angle: Of each row, radians, shape (B,), on the device of x.
    """

    def noise(x: Tensor, step: int) -> Tensor:
        theta = angle.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return theta.cos() * p(x, step) + theta.sin() * q(x, step)

    return noise


def _steps(
    score: Score,
    x: Tensor,
    sigma: float,
    numbers: range,
    rule: StepRule,
    noise: Noise,
    project: Project | None,
    observe: Observe | None,
) -> Tensor:
    """Langevin steps with these numbers at one level."""
    level = _level(x, sigma)
    for step in numbers:
        if project is not None:
            x = project(x, sigma, step)
        s, z = score(x, level).to(x.dtype), noise(x, step)
        alpha = rule(sigma, s, z)
        x = x + alpha * s + (2 * alpha) ** 0.5 * z
        if observe is not None:
            observe(x, step, sigma)
    return x


def _level(x: Tensor, sigma: float) -> Tensor:
    """What the score is told, shape (B,): at least float32, since half precision would take sigma off its level."""
    return torch.full((len(x),), sigma, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _known(paste: Callable[[Tensor, Tensor], Tensor], reference: Tensor, noise: Noise, steps_per_draw: int) -> Project:
    """The `project` that pastes into x the known part of y = reference + sigma z."""
    if steps_per_draw < 1:
        raise ValueError(f"expected steps_per_draw >= 1, got {steps_per_draw}")
    return lambda x, sigma, step: paste(x, reference + sigma * noise(x, step // steps_per_draw))
