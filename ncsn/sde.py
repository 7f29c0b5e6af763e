"""Stochastic differential equations from images to noise (Song et al. 2021, arXiv:2011.13456), in continuous time.

Legend: t in [0, 1]; dx = f(t) x dt + g(t) dw; x_t = alpha(t) x_0 + sigma(t) z given x_0; B(t) the integral of beta from
0 to t.

Divided by alpha each of them is an image plus noise, x_t / alpha = x_0 + (sigma / alpha) z. This quotient is the
noise level of the whole library: a score network s(x, sigma) is told `noise_level(t)` and sees x_t / alpha, under which
SDE ever it was trained; the score of x_t is s(x_t / alpha, sigma / alpha) / alpha. So losses, samplers and projections
are the same ones for all.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ncsn.noise import geometric_sigmas


class SDE(ABC):
    """One of VE, VP and sub-VP: a frozen value. Times are tensors of any shape, which the results have too."""

    @property
    @abstractmethod
    def prior_std(self) -> float:
        """Of the prior of x_1, N(0, prior_std^2 I)."""

    @abstractmethod
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t): x_t = alpha x_0 + sigma z."""

    @abstractmethod
    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """f(t) and g(t) of dx = f x dt + g dw: f = alpha' / alpha, g^2 = (sigma^2)' - 2 f sigma^2."""

    @abstractmethod
    def time(self, level: Tensor) -> Tensor:
        """The inverse of `noise_level`."""

    @abstractmethod
    def discretised(self, t: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """c and G of the chain x <- c x + G z that takes `steps` steps from t = 0 to 1, for the step at time t.

        SMLD for VE, DDPM for VP (arXiv:2011.13456, equations 20 and 22), Euler-Maruyama for sub-VP.

        Raises:
            ValueError: If the chain does not exist for so few steps.
        """

    @abstractmethod
    def levels(self, n: int) -> Tensor:
        """The noise levels of the chain that takes n steps, shape (n,), float64, decreasing.

        Those of SMLD for VE, of DDPM, sqrt(1 / prod_{j <= i} (1 - beta_j) - 1), for VP.

        Raises:
            ValueError: If there is no such chain.
        """

    def noise_level(self, t: Tensor) -> Tensor:
        """sigma(t) / alpha(t), what a score network is told."""
        alpha, sigma = self.scales(t)
        return sigma / alpha

    def likelihood_weight(self, t: Tensor) -> Tensor:
        """(g / sigma)^2, which makes denoising score matching a bound of the likelihood (arXiv:2101.09258)."""
        return (self.rates(t)[1] / self.scales(t)[1]) ** 2

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """log of the density of N(0, prior_std^2 I), shape (B,), for x of shape (B, ...)."""
        flat = x.flatten(1)
        log_normaliser = flat.shape[1] * math.log(math.sqrt(2 * math.pi) * self.prior_std)
        return -(flat / self.prior_std).square().sum(1) / 2 - log_normaliser


@dataclass(frozen=True)
class VE(SDE):
    """Variance exploding, SMLD in continuous time: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t.

    Args:
        sigma_min: Smallest noise level, in the units of x.
        sigma_max: Largest one; the largest distance of two images (Technique 1).

    Raises:
        ValueError: If not 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"expected 0 < sigma_min < sigma_max, got sigma_min={self.sigma_min}, sigma_max={self.sigma_max}"
            )

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), self.scales(t)[1] * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def time(self, level: Tensor) -> Tensor:
        return (level / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)

    def discretised(self, t: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        sigma, k = self.levels(steps).flip(0), _number(t, steps)
        variance = sigma.square()
        return torch.ones_like(t), (variance - torch.cat((variance.new_zeros(1), variance[:-1])))[k].sqrt().to(t)

    def levels(self, n: int) -> Tensor:
        return geometric_sigmas(self.sigma_max, self.sigma_min, n)


@dataclass(frozen=True)
class _Beta(SDE):
    """What VP and sub-VP share: f = -beta / 2, beta = beta_min + (beta_max - beta_min) t, alpha = exp(-B / 2)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(
                f"expected 0 < beta_min <= beta_max, got beta_min={self.beta_min}, beta_max={self.beta_max}"
            )

    @property
    def prior_std(self) -> float:
        return 1.0

    def beta(self, t: Tensor) -> Tensor:
        """beta(t)."""
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def integral(self, t: Tensor) -> Tensor:
        """B(t) = beta_min t + (beta_max - beta_min) t^2 / 2."""
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2

    def _time_of(self, integral: Tensor) -> Tensor:
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral).sqrt()
        return 2 * integral / (root + self.beta_min)


@dataclass(frozen=True)
class VP(_Beta):
    """Variance preserving, DDPM in continuous time: alpha = exp(-B / 2), sigma^2 = 1 - exp(-B); images in [-1, 1].

    Args:
        beta_min: beta(0), > 0.
        beta_max: beta(1).

    Raises:
        ValueError: If not 0 < beta_min <= beta_max.
    """

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self.integral(t)
        return (-integral / 2).exp(), (-torch.expm1(-integral)).sqrt()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        beta = self.beta(t)
        return -beta / 2, beta.sqrt()

    def time(self, level: Tensor) -> Tensor:
        return self._time_of(level.square().log1p())

    def discretised(self, t: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        beta = self.betas(steps)[_number(t, steps)].to(t)
        return (1 - beta).sqrt(), beta.sqrt()

    def betas(self, steps: int) -> Tensor:
        """beta_i of DDPM, from beta_min / N to beta_max / N, shape (N,), float64.

        Raises:
            ValueError: If not N > beta_max: the variance beta_max / N of a step must be below 1.
        """
        if not steps > self.beta_max:
            raise ValueError(f"expected more steps than beta_max={self.beta_max:g} under VP, got steps={steps}")
        return torch.linspace(self.beta_min / steps, self.beta_max / steps, steps, dtype=torch.float64)

    def levels(self, n: int) -> Tensor:
        return torch.expm1(-(-self.betas(n)).log1p().cumsum(0)).sqrt().flip(0)


@dataclass(frozen=True)
class SubVP(_Beta):
    """Sub-VP, of smaller variance at each time: alpha = exp(-B / 2), sigma = 1 - exp(-B); images in [-1, 1].

    Args:
        beta_min: beta(0), > 0.
        beta_max: beta(1).

    Raises:
        ValueError: If not 0 < beta_min <= beta_max.
    """

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        integral = self.integral(t)
        return (-integral / 2).exp(), -torch.expm1(-integral)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        beta = self.beta(t)
        return -beta / 2, (-beta * torch.expm1(-2 * self.integral(t))).sqrt()

    def time(self, level: Tensor) -> Tensor:
        return self._time_of(2 * (level / 2).asinh())

    def discretised(self, t: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        f, g = self.rates(t)
        return 1 + f / steps, g / math.sqrt(steps)

    def levels(self, n: int) -> Tensor:
        raise ValueError("expected VE or VP, which have the chains SMLD and DDPM, got sub-VP: it has continuous time")


SDES: dict[str, Callable[..., SDE]] = {"ve": VE, "vp": VP, "subvp": SubVP}


def noise_prediction(
    network: Callable[[Tensor, Tensor], Tensor], sde: SDE, *, levels: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The score s(x, sigma) = -n(alpha x, label) / sigma of a network that predicts noise, as DDPM and DDPM++ do.

    The label is 999 t in continuous time (arXiv:2011.13456, appendix C), the number k of the step of a discrete chain.

    Args:
        network: n(x_t, label) with x_t of shape (B, ...) and label of shape (B,), float32.
        sde: Of which it was trained.
        levels: Those of the chain that it was trained at, `SDE.levels`, on the device of x; None: continuous time.
    """

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        t = sde.time(sigma.double())
        if levels is None:
            label = 999 * t
        else:
            label = len(levels) - 1 - (sigma.double()[:, None] / levels).log().abs().argmin(1)
        shape = (-1, *[1] * (x.ndim - 1))
        alpha = sde.scales(t)[0].to(x.dtype).view(shape)
        return -network(alpha * x, label.float()) / sigma.view(shape)

    return score


def at_nearest_level(network: Callable[[Tensor, Tensor], Tensor], sigmas: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The score at any level, (sigma_i / sigma)^2 s(x, sigma_i), of a network that knows none but its own, as NCSN.

    sigma_i is the nearest of them by ratio. The image x + sigma^2 s that x is expected to be is that of sigma_i, so
    the score is right as far as that changes little from a level to the next. With it such networks are trained and
    drawn from under VE in continuous time.

    Args:
        network: s(x, sigma) for sigma of `sigmas`.
        sigmas: Its levels, shape (L,), on the device of x.
    """

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        nearest = sigmas[(sigma.double()[:, None] / sigmas).log().abs().argmin(1)].to(sigma.dtype)
        ratio = (nearest / sigma).view(-1, *[1] * (x.ndim - 1))
        return ratio**2 * network(x, nearest)

    return score


def _number(t: Tensor, steps: int) -> Tensor:
    """The number of the step at time t, floor(t (N - 1))."""
    return (t.double() * (steps - 1)).long()
