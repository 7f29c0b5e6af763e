"""Samplers: a start in, samples out; randomness and observation are arguments.

`noise(x, step)` returns standard normal values shaped like x for draw number `step` = 0, 1, ... of the whole
trajectory (`ncsn.random.seeded_noise` makes one); `observe(x, step, sigma)` is called after each step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ncsn.losses import Score
from ncsn.noise import langevin_step_sizes

Noise = Callable[[Tensor, int], Tensor]
Observe = Callable[[Tensor, int, float], None]


def torch_noise(x: Tensor, step: int) -> Tensor:
    """Noise from torch's global generator."""
    return torch.randn_like(x)


@torch.no_grad()
def annealed_langevin(
    score: Score,
    x: Tensor,
    sigmas: Tensor,
    *,
    epsilon: float,
    steps_per_level: int,
    denoise: bool = True,
    noise: Noise = torch_noise,
    observe: Observe | None = None,
) -> Tensor:
    """Draw samples by annealed Langevin dynamics (arXiv:1907.05600, Algorithm 1; step convention of the official code).

    At each sigma_i, T times: x <- x + alpha_i s(x, sigma_i) + sqrt(2 alpha_i) z, with
    alpha_i = epsilon (sigma_i / sigma_L)^2.
    At the end, with `denoise`: x <- x + sigma_L^2 s(x, sigma_L), the posterior mean (arXiv:2006.09011, section 5).

    Args:
        score: s(x, sigma).
        x: Start, shape (B, ...); uniform in [0, 1] in the papers.
        sigmas: Noise levels, shape (L,), strictly decreasing, pixel units.
        epsilon: Step size at the last level, pixel units squared, > 0.
        steps_per_level: T >= 1.
        denoise: Take the final denoising step.
        noise: Standard normal values, see the module.
        observe: Watches; must not change x.

    Returns:
        Samples, shape and dtype of x. They are not clamped to [0, 1].

    Raises:
        ValueError: If the levels do not strictly decrease, epsilon is not positive or T < 1.
    """
    if steps_per_level < 1:
        raise ValueError(f"expected steps_per_level >= 1, got {steps_per_level}")
    step = 0
    for sigma, alpha in zip(sigmas.tolist(), langevin_step_sizes(sigmas, epsilon).tolist(), strict=True):
        level = x.new_full((len(x),), sigma)
        for _ in range(steps_per_level):
            x = x + alpha * score(x, level) + (2 * alpha) ** 0.5 * noise(x, step)
            if observe is not None:
                observe(x, step, sigma)
            step += 1
    return x + sigma**2 * score(x, level) if denoise else x
