"""The likelihood of images under the probability flow ODE (Song et al. 2021, arXiv:2011.13456, section 4.3)."""

import math

import torch
from torch import Tensor

from ncsn import ode
from ncsn.losses import Score
from ncsn.sde import SDE


def log_likelihood(
    score: Score,
    x: Tensor,
    sde: SDE,
    probes: Tensor,
    *,
    t_min: float = 1e-5,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """log p_0(x) by the instantaneous change of variables (arXiv:1806.07366) with Hutchinson's trace estimate.

    Along the probability flow ODE dx / dsigma = -sigma s from t_min to 1, where x is x_t / alpha,

        log p(x at t_min) = log p(x at 1) - integral of sigma tr(ds / dx) dsigma,   tr J = E[v . J v].

    Unlike in the official code, the part of the ODE that is linear in x is not probed, as its trace is known: with
    Gaussian probes under VP and sub-VP that code's estimate has the term -B(1) (||v||^2 - D) / 2 more, which is noise.

    Args:
        score: s(x, sigma), differentiable; images must not depend on each other in it.
        x: Images as the SDE has them, uniformly dequantised, shape (B, ...); they count as x_t at t_min.
        sde: Of which the network was trained.
        probes: v with E[v v^T] = I, `random.signs` or standard normal: shape of x, or (n, B, ...) for n of them.
        t_min: Where the ODE starts.
        rtol: Of `ode.rk45`, which each image has steps of its own by.
        atol: Of `ode.rk45`.

    Returns:
        log p in nats, shape (B,); x_1 of each image, which under the prior N(0, prior_std^2 I) has log p(x at 1), shape
        of x; and how often the score was evaluated for each image, shape (B,).

    Raises:
        ValueError: If the probes do not have the shape of x.
    """
    directions = probes if probes.ndim > x.ndim else probes[None]
    if directions.shape[1:] != x.shape or len(directions) == 0:
        shape = tuple(x.shape)
        raise ValueError(f"expected probes of shape {shape} or {('n', *shape)}, n >= 1, got {tuple(probes.shape)}")
    dim = x[0].numel()
    first, last = (torch.tensor(t, dtype=torch.float64) for t in (t_min, 1.0))
    alpha_first, alpha_last = float(sde.scales(first)[0]), float(sde.scales(last)[0])

    def slope(u: Tensor, y: Tensor) -> Tensor:
        """Of the images and, as one column more, of the integral."""
        traces: list[Tensor] = []

        def probed(points: Tensor, sigma: Tensor) -> Tensor:
            with torch.enable_grad():
                points = points.detach().requires_grad_()
                s = score(points, sigma)
                products = [torch.autograd.grad(s, points, v, retain_graph=True)[0] for v in directions]
            traces.extend((v * product).flatten(1).sum(1) for v, product in zip(directions, products, strict=True))
            return s.detach()

        moved = ode.flow_slope(probed, u, y[:, :-1].view_as(x)).flatten(1)
        weight = (ode.SPREAD**2 * u.sinh() * u.cosh()).to(y.dtype)  # sigma dsigma / du
        return torch.cat((moved, (-weight * torch.stack(traces).mean(0))[:, None]), 1)

    levels = (float(sde.noise_level(t)) for t in (first, last))
    start, end = (ode.flow_time(level) for level in levels)
    y = torch.cat((x.flatten(1) / (alpha_first * math.cosh(start)), x.new_zeros(len(x), 1)), 1)
    y, evaluations = ode.rk45(slope, y, start, end, rtol=rtol, atol=atol)
    latent = alpha_last * math.cosh(end) * y[:, :-1].view_as(x)
    # the densities of x_t / alpha and of x_t differ by alpha^D
    volume = dim * (math.log(alpha_last) - math.log(alpha_first))
    return sde.prior_log_prob(latent) + y[:, -1] + volume, latent, evaluations


def bits_per_dim(log_prob: Tensor, dim: int, *, width: float = 1.0) -> Tensor:
    """Bits for each of the D values of an 8-bit image, -(log p / D + log(width / 256)) / log 2, shape of log_prob.

    The density of uniformly dequantised values bounds the probability of the 256 of them that are `width` apart in all
    (arXiv:1511.01844, section 3.1).

    Args:
        log_prob: In nats.
        dim: D.
        width: Of the range of the images: 1 of [0, 1], the `+ 8` of the official code; 2 of [-1, 1], its `+ 7`.
    """
    return -(log_prob / dim + math.log(width / 256)) / math.log(2)
