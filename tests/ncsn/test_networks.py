"""NCSNv2: published sizes, the official code's outputs, behaviour."""

from pathlib import Path

import pytest
import torch

from ncsn.networks import NCSNv2

GOLDEN = Path(__file__).parent.parent / "golden"


def test_parameter_count_is_the_published_one():
    with torch.device("meta"):
        network = NCSNv2(channels=3, width=128)
    assert sum(p.numel() for p in network.parameters()) == 29_694_083


def test_weights_of_the_official_code_give_its_output():
    golden = torch.load(GOLDEN / "ncsnv2_16.pt", weights_only=True)
    network = NCSNv2(channels=3, width=8)
    weights = {key: value for key, value in golden["state_dict"].items() if key != "sigmas"}
    assert list(network.state_dict()) == list(weights)
    network.load_state_dict(weights)
    out = network(golden["x"], golden["sigmas"][golden["labels"]])
    assert (out - golden["out"]).abs().max() < 1e-5 * golden["out_abs_max"]


def test_sigma_divides_the_output_and_does_nothing_else():
    network = NCSNv2(channels=1, width=8).double()
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, two = network(x, torch.ones(2).double()), network(x, torch.tensor([2.0, 0.5]).double())
    torch.testing.assert_close(two, one / torch.tensor([2.0, 0.5]).double()[:, None, None, None], rtol=1e-14, atol=0)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 6), (1, 28), (3, 32)])
def test_any_even_size_keeps_its_shape(channels, size):
    x = torch.rand(2, channels, size, size)
    assert NCSNv2(channels=channels, width=4)(x, torch.ones(2)).shape == x.shape


def test_bad_input_is_named():
    network = NCSNv2(channels=1, width=4)
    with pytest.raises(ValueError, match=r"multiples of 2, got \(7, 8\)"):
        network(torch.rand(1, 1, 7, 8), torch.ones(1))
    with pytest.raises(ValueError, match=r"one sigma an image, shape \(3,\), got \(1,\)"):
        network(torch.rand(3, 1, 8, 8), torch.ones(1))
    with pytest.raises(ValueError, match="width >= 2, got channels=1, width=1"):
        NCSNv2(channels=1, width=1)
    with pytest.raises(ValueError, match=r"one of elu, relu, lrelu, swish, got 'gelu'"):
        NCSNv2(channels=1, width=4, act="gelu")
