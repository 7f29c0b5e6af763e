"""Distributions whose score is known exactly at every noise level: the oracle of the tests."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """A mixture of isotropic Gaussians, sum_k w_k N(m_k, std^2 I); perturbed by sigma its variance is std^2 + sigma^2.

    Args:
        weights: w_k, shape (K,), positive, summing to 1.
        means: m_k, shape (K, D).
        std: Standard deviation of every component, >= 0; with 0 the density exists for sigma > 0 only.
    """

    weights: Tensor
    means: Tensor
    std: float

    def sample(self, u: Tensor, z: Tensor) -> Tensor:
        """Points of the mixture, m_k + std z, shape (B, D), where k is the component whose share of [0, 1) u is in.

        Args:
            u: Uniform in [0, 1), shape (B,).
            z: Standard normal, shape (B, D).
        """
        component = torch.searchsorted(self.weights.cumsum(0)[:-1], u, right=True)
        return self.means[component] + self.std * z

    def log_prob(self, x: Tensor, sigma: Tensor) -> Tensor:
        """log p_sigma(x), shape (B,), for x of shape (B, D) and sigma of shape (B,)."""
        variance = self.std**2 + sigma**2
        square = (x[:, None] - self.means).square().sum(-1)  # (B, K)
        log_normal = -square / (2 * variance[:, None]) - x.shape[1] / 2 * torch.log(2 * torch.pi * variance)[:, None]
        return torch.logsumexp(self.weights.log() + log_normal, 1)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The gradient of log p_sigma, shape (B, D): sum_k r_k(x) (m_k - x) / (std^2 + sigma^2)."""
        variance = (self.std**2 + sigma**2)[:, None]
        square = (x[:, None] - self.means).square().sum(-1)
        responsibility = torch.softmax(self.weights.log() - square / (2 * variance), 1)
        return (responsibility @ self.means - x) / variance
