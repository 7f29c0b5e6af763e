"""Evaluations of a network with each switch, and the memory that they take."""

import pytest
import torch
from torch import nn

from ncsn.inference import Evaluator, activation_bytes, micro_batch
from ncsn.networks import NCSNv2


@pytest.fixture
def network():
    torch.manual_seed(0)
    return NCSNv2(channels=3, width=8)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 16, 16, generator=generator), torch.tensor([1.0, 0.5, 0.1, 0.01])


def test_fp32_is_the_network_itself(network, batch):
    expected = network(*batch).detach()
    score = Evaluator(network)(*batch)
    assert not score.requires_grad
    torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)


def test_bf16_is_autocast_and_returns_what_it_was_given(network, batch):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = network(*batch).float()
    score = Evaluator(network, precision="bf16")(*batch)
    assert score.dtype == torch.float32
    exact = Evaluator(network)(*batch)
    scale = exact.abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    assert ((score - exact) / scale).abs().max() > 1e-3  # it is not float32
    assert ((score - expected) / scale).abs().mean() < 0.02


class Known(nn.Module):
    """Small; its activations can be counted by hand: input, convolution, sum."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(2, 6, 3, padding=1)

    def forward(self, x, sigma):
        y = self.convolution(x)
        z = y + y
        del y
        return z[:, :2] / sigma.view(-1, 1, 1, 1)


def test_compiled_is_the_same():
    torch.manual_seed(0)
    network, x, sigma = Known(), torch.randn(4, 2, 8, 8), torch.tensor([1.0, 0.5, 0.1, 0.01])
    expected = Evaluator(network)(x, sigma)
    torch.testing.assert_close(Evaluator(network, compile=True)(x, sigma), expected, rtol=1e-4, atol=1e-4)


def test_bad_switches_are_refused(network):
    with pytest.raises(ValueError, match=r"expected a precision of fp32, tf32, bf16, got 'fp16'"):
        Evaluator(network, precision="fp16")
    with pytest.raises(ValueError, match=r"expected cuda_graph=False on cpu"):
        Evaluator(network, cuda_graph=True)


def test_activations_are_counted(network):
    with torch.device("meta"):
        known = Known()
    values = 10 * 10
    assert activation_bytes(known, (2, 10, 10)) == 4 * values * (2 + 6 + 6)


def test_the_count_is_what_the_profiler_sees(network):
    with torch.device("meta"):
        twin = NCSNv2(channels=3, width=8)
    counted = activation_bytes(twin, (3, 32, 32))
    x, sigma = torch.rand(8, 3, 32, 32), torch.ones(8)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as seen:
        network.eval()(x, sigma)
    now = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert 0.7 < (peak + x.nbytes) / 8 / counted < 1.5


def test_as_many_images_as_fit_into_half_the_memory():
    assert micro_batch(1000, 10, 100) == 48
    assert micro_batch(1000, 10, 20) == 20
    assert micro_batch(1000, 100, 20) == 5
    assert micro_batch(10, 100, 20) == 1


@pytest.mark.gpu
class TestOnGPU:
    """What only a GPU can show."""

    def test_a_graph_computes_the_same_bits(self, network, batch):
        x, sigma = (value.cuda() for value in batch)
        network = network.cuda()
        for precision in ("fp32", "bf16"):
            eager, graph = (
                Evaluator(network, precision=precision),
                Evaluator(network, precision=precision, cuda_graph=True),
            )
            for scale in (1, 2):
                torch.testing.assert_close(graph(scale * x, sigma), eager(scale * x, sigma), rtol=1e-5, atol=1e-5)

    def test_nothing_waits_for_the_device(self, network):
        from ncsn import noise, random, samplers

        index = torch.arange(4, device="cuda")
        score = Evaluator(network.cuda())
        start = random.start_images(0, index, (3, 16, 16))
        score(start, torch.ones(4, device="cuda"))  # chooses kernels
        draw = lambda: samplers.annealed_langevin(  # noqa: E731
            score,
            start,
            noise.geometric_sigmas(1, 0.1, 4),
            epsilon=1e-3,
            steps_per_level=2,
            noise=random.seeded_noise(0, index),
        )
        torch.cuda.set_sync_debug_mode("error")
        try:
            x = draw()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert x.isfinite().all()

    def test_noise_is_that_of_the_cpu(self):
        from ncsn import random

        index = torch.arange(1000)
        for a, b in zip(random.words(3, 0, index, 7, 64), random.words(3, 0, index.cuda(), 7, 64), strict=True):
            assert torch.equal(a, b.cpu())
        a, b = (random.normal(3, 0, where, 7, (3, 32, 32)).cpu() for where in (index, index.cuda()))
        assert (a - b).abs().max() < 1e-6
