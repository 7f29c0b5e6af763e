"""Distances between sets of images, from moments of their features.

Legend: n rows (images), d columns (features).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of feature rows, in float64; those of two disjoint sets add up to those of their union.

    The sum is exact up to round-off (Chan, Golub & LeVeque 1979, eq. 2.1), so shards can be summed up in any order
    and on any number of workers.

    Args:
        n: Number of rows, at least 1.
        mean: (d,) float64.
        scatter: (d, d) float64, the centred second moment sum_k (x_k - mean)(x_k - mean)^T.
    """

    n: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Moments":
        """The moments of feature rows.

        Args:
            rows: (n, d), of any floating type; computed in float64.

        Raises:
            ValueError: If rows is not a matrix, is empty, or holds NaN or infinity.
        """
        if rows.ndim != 2 or not len(rows):
            raise ValueError(f"expected features (n, d) with n >= 1, got shape {tuple(rows.shape)}")
        bad = (~torch.isfinite(rows)).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"expected finite features, got NaN or infinity in {len(bad)} of {len(rows)} rows, first row {bad[0]}"
            )
        rows = rows.double()
        mean = rows.mean(dim=0)
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred)

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets together.

        Raises:
            ValueError: If the numbers of features differ.
        """
        _check_same_features(self, other)
        n = self.n + other.n
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.n / n)
        scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.n * other.n / n)
        return Moments(n, mean, scatter)

    @property
    def cov(self) -> Tensor:
        """The unbiased covariance scatter / (n - 1), (d, d) float64; ValueError if n < 2."""
        if self.n < 2:
            raise ValueError(f"expected n >= 2 rows for a covariance, got n={self.n}")
        return self.scatter / (self.n - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """The Frechet distance of two Gaussians with the moments of two feature sets.

    d^2 = ||mu_a - mu_b||^2 + Tr(S_a + S_b - 2 (S_a S_b)^{1/2})     (Heusel et al. 2017, arXiv:1706.08500, eq. 6)

    The eigenvalues of S_a S_b, a product without symmetry, are those of the symmetric S_a^{1/2} S_b S_a^{1/2}, which
    has no complex ones: the result is a finite number for covariances of any rank.

    Args:
        a: Moments of one set, n >= 2.
        b: Moments of the other, n >= 2, as many features.

    Returns:
        The squared distance, >= 0 (round-off below zero is cut off).

    Raises:
        ValueError: If the numbers of features differ or a set has fewer than 2 rows.
    """
    _check_same_features(a, b)
    cov_a, cov_b = a.cov, b.cov
    values, vectors = torch.linalg.eigh(cov_a)
    # root root^T = S_a; root is S_a^{1/2} turned by the eigenvectors, which leaves the eigenvalues below as they are.
    root = vectors * values.clamp(min=0).sqrt()
    product = root.T @ cov_b @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def _check_same_features(a: Moments, b: Moments) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"expected as many features in both sets, got {len(a.mean)} and {len(b.mean)}")
