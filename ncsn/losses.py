"""Score matching objectives: deterministic functions, the draws are arguments; one value an example.

Legend: B batch; x clean images in [0, 1], any shape (B, ...); sigma noise levels, shape (B,); z standard normal.
"""

from collections.abc import Callable

from torch import Tensor

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
    scale = sigma.view(-1, *[1] * (x.ndim - 1))
    residual = scale * score(x + scale * z, sigma) + z
    return 0.5 * residual.square().flatten(1).sum(1)
