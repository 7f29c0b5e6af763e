"""The oracle: its score is the gradient of its log density, its density integrates to one."""

import torch

from ncsn.toy import Mixture


def _mixture():
    return Mixture(torch.tensor([0.8, 0.2]).double(), torch.tensor([[5.0, 5.0], [-5.0, -5.0]]).double(), 1.0)


def test_score_is_the_gradient_of_log_prob():
    x = (6 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()).requires_grad_()
    sigma = torch.linspace(0.1, 5, 50).double()
    (gradient,) = torch.autograd.grad(_mixture().log_prob(x, sigma).sum(), x)
    torch.testing.assert_close(_mixture().score(x, sigma), gradient)


def test_density_integrates_to_one():
    axis = torch.linspace(-20, 20, 401).double()
    x = torch.cartesian_prod(axis, axis)
    density = _mixture().log_prob(x, torch.ones(len(x)).double()).exp()
    assert abs(density.sum() * 0.1**2 - 1) < 1e-6
