from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from ncsn.metrics import Moments, frechet_distance

GOLDEN = torch.load(Path(__file__).parent.parent / "golden" / "fid.pt", weights_only=True)


def rows(n: int, d: int, seed: int, *, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Correlated float64 rows."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + shift


def distance(a: Tensor, b: Tensor) -> float:
    return frechet_distance(Moments.of(a), Moments.of(b))


def test_moments_are_numpys() -> None:
    x = rows(50, 7, 0, shift=3.0)
    moments = Moments.of(x)
    assert moments.n == 50
    np.testing.assert_allclose(moments.mean, np.mean(x.numpy(), axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.cov, np.cov(x.numpy(), rowvar=False), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("sizes", [(100, 100), (1, 199), (3, 90, 1, 106)])
def test_moments_of_shards_add_up(sizes: tuple[int, ...]) -> None:
    # A mean far from zero: sums of squares instead of centred moments would lose all digits of the covariance.
    x = rows(200, 5, 1, shift=1e6)
    whole, parts = Moments.of(x), reduce(add, map(Moments.of, x.split(list(sizes))))
    assert parts.n == whole.n
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(parts.cov, whole.cov, rtol=1e-7, atol=1e-8)


def test_float32_features_are_averaged_in_float64() -> None:
    x = (rows(4000, 3, 2) + 100).float()
    torch.testing.assert_close(Moments.of(x).mean, x.double().mean(dim=0), rtol=1e-15, atol=0)


def test_golden_values() -> None:
    assert distance(GOLDEN["feat1"], GOLDEN["feat2"]) == pytest.approx(GOLDEN["fid"], rel=1e-9)
    assert distance(GOLDEN["feat1"], GOLDEN["feat1"]) == pytest.approx(GOLDEN["fid_self"], abs=1e-9)


@pytest.mark.parametrize(("n", "d"), [(300, 24), (500, 64)])
def test_agrees_with_the_matrix_square_root_of_scipy(n: int, d: int) -> None:
    a, b = rows(n, d, 3), rows(n + 50, d, 4, scale=1.5, shift=0.2)
    x, y = Moments.of(a), Moments.of(b)
    root = scipy.linalg.sqrtm((x.cov @ y.cov).numpy()).real
    expected = float((x.mean - y.mean).square().sum() + x.cov.trace() + y.cov.trace()) - 2 * np.trace(root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [40, 400], ids=["rank deficient", "full rank"])
def test_agrees_with_torch_fidelity_on_the_same_features(n: int) -> None:
    a, b = rows(n, 64, 5), rows(n + 30, 64, 6, scale=1.2, shift=0.1)
    library = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    assert distance(a, b) == pytest.approx(library[KEY_METRIC_FID], rel=1e-6)


def test_diagonal_gaussians_in_closed_form() -> None:
    # Commuting covariances: d^2 = |mu_a - mu_b|^2 + sum_k (s_a,k - s_b,k)^2, s the standard deviations.
    s_a, s_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([2.0, 0.1, 0.0]).double()
    mean_a, mean_b = torch.tensor([0.0, 1.0, -1.0]).double(), torch.tensor([0.5, 1.0, 2.0]).double()
    a, b = Moments(11, mean_a, 10 * s_a.square().diag()), Moments(21, mean_b, 20 * s_b.square().diag())
    expected = (mean_a - mean_b).square().sum() + (s_a - s_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-12)


def test_a_shift_alone_is_its_squared_length() -> None:
    x = rows(100, 10, 7)
    assert distance(x, x + 0.3) == pytest.approx(10 * 0.3**2, rel=1e-9)


@pytest.mark.parametrize("n", [64, 1000])
def test_identical_sets_have_no_distance(n: int) -> None:
    x = rows(n, 128, 8)
    assert 0 <= distance(x, x) < 1e-5


def test_fewer_rows_than_features_is_finite() -> None:
    a, b = rows(64, 128, 9), rows(64, 128, 10)
    value = distance(a, b)
    assert np.isfinite(value)
    assert value > 0


def test_constant_features_are_finite() -> None:
    x = torch.ones(5, 4)
    assert distance(x, x) == 0
    assert distance(x, x + 1) == pytest.approx(4)


def test_errors_name_what_was_wrong() -> None:
    x = rows(10, 4, 11)
    with pytest.raises(ValueError, match="as many features in both sets, got 4 and 3"):
        distance(x, x[:, :3])
    with pytest.raises(ValueError, match="as many features in both sets, got 4 and 3"):
        Moments.of(x) + Moments.of(x[:, :3])
    with pytest.raises(ValueError, match="n >= 2 rows for a covariance, got n=1"):
        distance(x, x[:1])
    with pytest.raises(ValueError, match=r"expected features \(n, d\) with n >= 1, got shape \(0, 4\)"):
        Moments.of(x[:0])
    x[7, 2] = torch.nan
    x[9, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity in 2 of 10 rows, first row 7"):
        Moments.of(x)
