"""An ordinary differential equation for each row of a batch, with steps that each row chooses for itself."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

SPREAD = 0.5  # of images, roughly their standard deviation in the units of x: where the flow's coordinates change over

# Dormand and Prince, "A family of embedded Runge-Kutta formulae" (1980): order 5, the error estimate of order 4.
_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_SAFETY, _LEAST, _MOST = 0.9, 0.2, 10.0


def rk45(
    slope: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    start: float,
    end: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    most: int = 10_000,
) -> tuple[Tensor, Tensor]:
    """Solve dy / dt = slope(t, y) from `start` to `end`, by the method and the step control of SciPy's RK45.

    A step is taken if the root mean square of error / (atol + rtol |y|) over a row is below 1; the next one is
    0.9 error^(-1/5) times as long, a fifth to tenfold. Rows have times and steps of their own, so what becomes of one
    does not depend on the others; they are all evaluated until the last one is there.

    Args:
        slope: slope(t, y) with t of shape (B,), float64.
        y: Start, shape (B, ...).
        start: First time.
        end: Last time, before or after the first.
        rtol: Relative tolerance, > 0.
        atol: Absolute tolerance, > 0.
        most: Evaluations after which to give up.

    Returns:
        y at the end, shape and dtype of y; and how often the slope of each row was evaluated on its way, shape (B,).

    Raises:
        ValueError: If a tolerance is not positive.
        ArithmeticError: If the solution is not finite, or needs more evaluations than `most`.
    """
    if not (rtol > 0 and atol > 0):
        raise ValueError(f"expected rtol > 0 and atol > 0, got rtol={rtol}, atol={atol}")

    def size(values: Tensor) -> Tensor:
        return values.double().square().flatten(1).mean(1).sqrt()

    span = end - start
    t = torch.full((len(y),), start, dtype=torch.float64, device=y.device)
    first, evaluations = slope(t, y), torch.ones_like(t, dtype=torch.long)
    scale = atol + rtol * y.abs()
    h = span * (0.01 * size(y / scale) / (size(first / scale) * abs(span))).clamp(1e-6, 1)
    rejected = torch.zeros_like(t, dtype=torch.bool)
    while bool((going := (end - t).abs() > 1e-12 * abs(span)).any()):
        left = end - t
        h = torch.where(h.abs() < left.abs(), h, left)
        slopes = [first]
        for row, c in zip(_A, _C, strict=True):
            moved = sum((a * k for a, k in zip(row, slopes, strict=True) if a), torch.zeros_like(y))
            there = y + _rows(h, y) * moved
            slopes.append(slope(t + c * h, there))
        evaluations += len(_A) * going
        error = _rows(h, y) * sum((e * k for e, k in zip(_E, slopes, strict=True) if e), torch.zeros_like(y))
        ratio = size(error / (atol + rtol * torch.maximum(y.abs(), there.abs())))
        if (many := bool((evaluations > most).any())) or not bool(ratio.isfinite().all()):
            what = f"more than {most} evaluations" if many else "values that are not finite"
            raise ArithmeticError(f"the ODE came to {what} at t={float(t.min()):.4g} with rtol={rtol}, atol={atol}")
        taken = ratio < 1
        y, first = (torch.where(_rows(taken, y).bool(), new, old) for new, old in ((there, y), (slopes[-1], first)))
        t = torch.where(taken, t + h, t)
        longest = torch.where(taken & ~rejected, _MOST, 1.0)
        h = h * (_SAFETY * ratio.clamp(min=1e-10) ** -0.2).clamp(min=_LEAST).minimum(longest)
        rejected = ~taken
    return y, evaluations


def flow_time(sigma: float) -> float:
    """u = asinh(sigma / SPREAD), over which `flow_slope` is solved: like sigma below SPREAD, like log sigma above."""
    return math.asinh(sigma / SPREAD)


def flow_slope(score: Callable[[Tensor, Tensor], Tensor], u: Tensor, y: Tensor) -> Tensor:
    """dy / du of the probability flow ODE for x = cosh(u) y at the noise level sigma = SPREAD sinh(u).

    dx / dsigma = -sigma s(x, sigma) in coordinates in which data of the standard deviation SPREAD do not move at all
    and others little, at small and at large levels alike: fewer evaluations than over log sigma or over t.

    Args:
        score: s(x, sigma).
        u: Shape (B,), float64.
        y: Shape (B, ...).
    """
    sigma = SPREAD * u.sinh()
    s = score(_rows(u.cosh(), y) * y, sigma.to(torch.promote_types(y.dtype, torch.float32))).to(y.dtype)
    return -_rows(SPREAD * sigma, y) * s - _rows(u.tanh(), y) * y


def _rows(values: Tensor, y: Tensor) -> Tensor:
    """One value for each row of y, in its dtype, shape (B, 1, ...)."""
    return values.to(y.dtype).view(-1, *[1] * (y.ndim - 1))
