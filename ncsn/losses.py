"""Score matching objectives: deterministic functions, the draws are arguments; one value an example.

Legend: B batch; x clean images in [0, 1], any shape (B, ...); sigma noise levels, shape (B,); z standard normal;
v random directions; J the Jacobian of the score s by x.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ncsn.sde import SDE

Score = Callable[[Tensor, Tensor], Tensor]  # score(x, sigma): (B, ...), (B,) -> (B, ...)


def denoising_score_matching(score: Score, x: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
    """Annealed denoising score matching with the weight lambda(sigma) = sigma^2 (arXiv:1907.05600, equations 5 and 6).

    0.5 sigma^2 ||s(x + sigma z, sigma) + z / sigma||^2 = 0.5 ||sigma s(x + sigma z, sigma) + z||^2, summed over the
    image: a zero score has the expectation D / 2.

    Args:
        score: The score network.
        x: Images in [0, 1], shape (B, ...).
        sigma: Noise levels in pixel units, shape (B,).
        z: Standard normal values, shape of x.

    Returns:
        One loss an example, shape (B,).
    """
    scale = _like_images(sigma, x)
    residual = scale * score(x + scale * z, sigma) + z
    return 0.5 * residual.square().flatten(1).sum(1)


def continuous_score_matching(
    score: Score, sde: SDE, x: Tensor, t: Tensor, z: Tensor, *, likelihood_weighting: bool = False
) -> Tensor:
    """Denoising score matching at the times t of an SDE (arXiv:2011.13456, equation 7).

    With x_t = alpha x + sigma z and s_t the score of x_t, 0.5 ||sigma s_t(x_t) + z||^2, or with likelihood weighting
    (arXiv:2101.09258) 0.5 g^2 ||s_t(x_t) + z / sigma||^2. As s_t = s(x_t / alpha, sigma / alpha) / alpha this is
    `denoising_score_matching` at the level sigma / alpha; and at the levels of a discrete chain, `VE.levels` and
    `VP.levels`, that function is the loss of SMLD and of DDPM.

    Args:
        score: The score network.
        sde: The SDE.
        x: Images as the SDE has them, shape (B, ...).
        t: Times in (0, 1], shape (B,); at least about 1e-5; in float64, where 1 - exp(-B) keeps its digits near 0.
        z: Standard normal values, shape of x.
        likelihood_weighting: lambda = g^2 in place of sigma^2.

    Returns:
        One loss an example, shape (B,).
    """
    loss = denoising_score_matching(score, x, sde.noise_level(t).to(x.dtype), z)
    return sde.likelihood_weight(t).to(x.dtype) * loss if likelihood_weighting else loss


def sliced_score_matching(
    score: Score, x: Tensor, sigma: Tensor, v: Tensor, *, variance_reduced: bool = True
) -> Tensor:
    """Sliced score matching at x itself, averaged over the directions of an example (arXiv:1905.07088, section 3).

    SSM: (v . s)^2 / 2 + v . J v. SSM-VR, with reduced variance: ||s||^2 / 2 + v . J v. For E[v v^T] = I both have
    the expectation ||s||^2 / 2 + tr J, the objective of score matching itself. The cost is one forward of the score and
    one vector-Jacobian product for each direction.

    Directions are used as given. Standard normal (as in the official code) and Rademacher ones have E[v v^T] = I. The
    official SSM takes unit vectors, `torch.nn.functional.normalize(v, dim=-1)` for x of shape (B, D): E[v v^T] = I / D,
    which scales its objective by 1 / D and does not suit SSM-VR. Examples must not depend on each other in the score.

    Args:
        score: The score; differentiable twice.
        x: Shape (B, ...).
        sigma: Noise levels that the score is told, shape (B,).
        v: Directions, shape of x, or (n, B, ...) for n of them.
        variance_reduced: SSM-VR.

    Returns:
        One loss an example, shape (B,). Gradients reach what the score depends on, not x; without gradients under
        `torch.no_grad`.

    Raises:
        ValueError: If the directions do not have the shape of x.
    """
    directions = v if v.ndim > x.ndim else v[None]
    if directions.ndim != x.ndim + 1 or directions.shape[1:] != x.shape or len(directions) == 0:
        shape = tuple(x.shape)
        raise ValueError(f"expected v of shape {shape} or {('n', *shape)}, n >= 1, got {tuple(v.shape)}")
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        s = score(x, sigma)
        products = [torch.autograd.grad(s, x, u, retain_graph=True, create_graph=create_graph)[0] for u in directions]
    curvature = (directions * torch.stack(products)).flatten(2).sum(2)
    square = s.square().flatten(1).sum(1) if variance_reduced else (directions * s).flatten(2).sum(2).square()
    return (0.5 * square + curvature).mean(0)


def annealed_sliced_score_matching(
    score: Score, x: Tensor, sigma: Tensor, z: Tensor, v: Tensor, *, variance_reduced: bool = True
) -> Tensor:
    """Sliced score matching at x + sigma z with the weight lambda(sigma) = sigma^2 (arXiv:1907.05600, section 4.2).

    Args:
        score: The score network.
        x: Images in [0, 1], shape (B, ...).
        sigma: Noise levels in pixel units, shape (B,).
        z: Standard normal values, shape of x.
        v: Directions, as in `sliced_score_matching`.
        variance_reduced: As there.

    Returns:
        One loss an example, shape (B,).

    Raises:
        ValueError: If the directions do not have the shape of x.
    """
    noisy = x + _like_images(sigma, x) * z
    return sigma**2 * sliced_score_matching(score, noisy, sigma, v, variance_reduced=variance_reduced)


def _like_images(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.view(-1, *[1] * (x.ndim - 1))
