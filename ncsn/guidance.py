"""Drawing from p(x | y) with an unconditional network: a classifier's gradient added to its score."""

from collections.abc import Callable

import torch
from torch import Tensor

from ncsn.losses import Score

LogProb = Callable[[Tensor, Tensor], Tensor]  # log p(y | x, sigma): (B, ...), (B,) -> (B,)


def guided(score: Score, log_prob: LogProb, *, scale: float = 1.0) -> Score:
    """s(x, sigma) + scale times the gradient of log p_sigma(y | x) by x (arXiv:2011.13456, equation 14).

    By Bayes' rule the score of p_sigma(x | y) for scale = 1; larger ones draw what is more typical of y
    (arXiv:2105.05233). The samplers take it as they take a score.

    Args:
        score: s(x, sigma).
        log_prob: log p_sigma(y | x) of noisy x, in nats, differentiable; `of_denoised` makes one.
        scale: >= 0.

    Raises:
        ValueError: If the scale is negative or not finite.
    """
    if not 0 <= scale < float("inf"):
        raise ValueError(f"expected a finite scale >= 0, got {scale}")

    def conditional(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.enable_grad():
            points = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(log_prob(points, sigma).sum(), points)
        return score(x, sigma) + scale * gradient

    return conditional


def of_denoised(score: Score, log_prob: Callable[[Tensor], Tensor], *, spread: float | None = None) -> LogProb:
    """log p(y | D(x, sigma)) in place of log p_sigma(y | x); D = x + sigma^2 s is the image that x is expected to be.

    So a classifier of clean images guides without being trained on noisy ones (arXiv:2302.07121). The gradient goes
    through the network: with it a step costs a second forward pass and a backward one. That asks for a score whose
    derivative is right, too: one that is not told the level well has steps as long as sigma^2 / sigma_L^2 allows. With
    `spread` the derivative of D is taken for that of Gaussian data instead, spread^2 / (spread^2 + sigma^2), without
    the backward pass.

    Args:
        score: s(x, sigma); differentiable, unless there is a spread.
        log_prob: log p(y | x) of images in the units of x, differentiable.
        spread: Standard deviation of the data, in the units of x.
    """

    def noisy(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        if spread is None:
            return log_prob(x + level**2 * score(x, sigma))
        with torch.no_grad():
            image = x + level**2 * score(x, sigma)
        return log_prob(image + spread**2 / (spread**2 + level**2) * (x - x.detach()))

    return noisy
