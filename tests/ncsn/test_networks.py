"""Score networks: published sizes and costs, the official code's outputs and losses, identities, behaviour."""

import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ncsn.losses import denoising_score_matching
from ncsn.networks import (
    DDPM,
    MLP,
    NCSN,
    NETWORKS,
    DDPMpp,
    NCSNDeeper,
    NCSNpp,
    NCSNv2,
    NCSNv2Deeper,
    NCSNv2Deepest,
    RefineNet,
    ResScore,
    UNet,
)
from ncsn.noise import geometric_sigmas
from tests.ncsn import golden

SIGMAS = geometric_sigmas(1.0, 0.01, 10)


def _small(name, **arguments):
    """One of NETWORKS with few channels; its levels, where it has some, are SIGMAS."""
    torch.manual_seed(0)
    if issubclass(NETWORKS[name], NCSN):
        arguments["sigmas"] = SIGMAS
    if name not in ("ncsnpp", "ddpmpp", "ddpm"):
        return NETWORKS[name](**{"channels": 3, "width": 8} | arguments)
    network = NETWORKS[name](
        **{"channels": 3, "width": 8, "multipliers": (1, 2), "blocks": 1, "dropout": 0.0} | arguments
    )
    for parameter in network.parameters():  # the last ones of each block are 1e-6 at first, which hides the others
        if parameter.ndim > 1:
            torch.nn.init.kaiming_uniform_(parameter, nonlinearity="linear")
    return network


def _images(*shape, dtype=torch.float32):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("network", "arguments", "parameters", "size", "gflops"),
    [
        (NCSN, {"channels": 3, "width": 128, "sigmas": 10}, 30_117_635, 32, 19.786),
        (NCSN, {"channels": 1, "width": 64, "sigmas": 10}, 7_638_657, 28, 3.786),
        (NCSN, {"channels": 3, "width": 128, "sigmas": 232}, 39_750_659, 32, 19.786),
        (NCSN, {"channels": 3, "width": 8, "sigmas": 10}, 143_795, 32, None),
        (NCSNDeeper, {"channels": 3, "width": 128, "sigmas": 10, "norm": "instance"}, 83_931_651, 32, 18.876),
        (NCSNDeeper, {"channels": 3, "width": 128, "sigmas": 10}, 84_183_811, 32, 18.876),
        (RefineNet, {"channels": 3, "width": 128}, 29_727_107, 32, 19.786),
        (NCSNv2, {"channels": 3, "width": 128}, 29_694_083, 32, 19.786),
        (NCSNv2, {"channels": 3, "width": 128}, 29_694_083, 64, 79.144),
        (NCSNv2, {"channels": 3, "width": 8}, 117_323, 32, None),
        (NCSNv2Deeper, {"channels": 3, "width": 128}, 83_445_379, 96, 169.883),
        (NCSNv2Deeper, {"channels": 3, "width": 128}, 83_445_379, 128, 302.015),
        (NCSNv2Deeper, {"channels": 3, "width": 8}, 327_979, 32, None),
        (NCSNv2Deepest, {"channels": 3, "width": 128}, 94_132_611, 32, 13.109),
        (NCSNv2Deepest, {"channels": 3, "width": 128}, 94_132_611, 256, 838.961),
        (NCSNv2Deepest, {"channels": 3, "width": 8}, 370_011, 32, None),
        (ResScore, {"channels": 3}, 1_379_651, 32, 0.353),
        (NCSNpp, {"channels": 3, "width": 128}, 62_758_915, 32, 21.788),
        (NCSNpp, {"channels": 3, "width": 128, "sigmas": 1000}, 62_693_251, 32, 21.788),
        (NCSNpp, {"channels": 3, "width": 128, "blocks": 8}, 107_587_075, 32, 37.188),
        (DDPMpp, {"channels": 3, "width": 128}, 61_804_419, 32, 21.693),
        (DDPMpp, {"channels": 3, "width": 128, "blocks": 8}, 106_632_579, 32, 37.094),
        (DDPM, {"channels": 3, "width": 128}, 35_218_947, 32, 12.041),
    ],
)
def test_parameters_and_cost_are_the_published_ones(network, arguments, parameters, size, gflops):
    if "sigmas" in arguments:
        arguments = arguments | {"sigmas": geometric_sigmas(50, 0.01, arguments["sigmas"]).tolist()}
    with torch.device("meta"):
        built = network(**arguments).to("meta")
        x, sigma = torch.empty(1, arguments["channels"], size, size), torch.empty(1)
    assert sum(p.numel() for p in built.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        assert built(x, sigma).shape == x.shape
    if gflops is not None:
        # the filters of NCSN++ are counted otherwise: less by 0.025, with 4 blocks as with 8
        assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, rel=2e-3 if network is NCSNpp else 1e-3)


@pytest.mark.parametrize(
    ("network", "tensors"),
    [("ncsn", 173), ("ncsn_deeper", 217), ("refinenet", 315), ("ncsnv2", 153), ("ncsnv2_deeper", 191)],
)
def test_state_dict_has_as_many_tensors_as_the_official_one_less_sigmas(network, tensors):
    assert len(_small(network).state_dict()) == tensors


@pytest.mark.parametrize("file", golden.NETWORKS)
def test_weights_of_the_official_code_give_its_output_layer_by_layer(file):
    data, network = golden.official(file)
    layers = {}
    for name in data.get("intermediates", ()):
        network.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: layers.update({name: out}))
    out = network(data["x"], data["sigmas"][data["labels"]])
    assert (out - data["out"]).abs().max() < 5e-6 * data["out"].abs().max()
    assert list(layers) == list(data.get("intermediates", ()))
    for name, layer in layers.items():
        expected = data["intermediates"][name]
        assert (layer - expected).abs().max() < 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize("file", golden.NETWORKS)
def test_losses_and_gradients_of_the_official_code(file):
    data, network = golden.official(file)
    dsm = data["dsm"]
    loss = denoising_score_matching(network, dsm["x"], data["sigmas"][dsm["labels"]], dsm["z"])
    torch.testing.assert_close(loss, dsm["per_sample"].float(), rtol=1e-4, atol=0)
    assert loss.mean().item() == pytest.approx(float(dsm["loss"]), rel=1e-4)
    loss.mean().backward()
    norms = {name: p.grad.norm().item() for name, p in network.named_parameters() if p.grad is not None}
    largest = max(float(norm) for norm in dsm["grad_norms"].values())
    assert norms.keys() == dsm["grad_norms"].keys()
    for name, norm in dsm["grad_norms"].items():
        assert norms[name] == pytest.approx(float(norm), rel=1e-3, abs=1e-6 * largest), name


@pytest.mark.parametrize("name", NETWORKS)
def test_any_size_that_is_a_multiple_keeps_its_shape(name):
    for channels in (1, 3):
        network = _small(name, channels=channels)
        m = network.multiple
        for height, width in ((m, m), (m, 3 * m), (5 * m, 2 * m), (28, 28)):
            if height % m == 0:
                x = _images(2, channels, height, width)
                out = network(x, SIGMAS[[0, 9]].float())
                assert out.shape == x.shape
                assert out.isfinite().all()


def test_multiples():
    multiples = {name: _small(name).multiple for name in NETWORKS}
    assert multiples == {
        "ddpm": 2,
        "ddpmpp": 2,
        "ncsnpp": 2,
        "ncsn": 2,
        "ncsn_deeper": 4,
        "ncsnv2": 2,
        "ncsnv2_deeper": 4,
        "ncsnv2_deepest": 8,
        "refinenet": 2,
        "resscore": 4,
        "unet": 4,
    }
    assert UNet(channels=1, width=8, multipliers=(1, 1, 2, 2)).multiple == 8
    assert UNet(channels=1, width=5, multipliers=(1,)).multiple == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_float64_agrees_with_float32(name):
    network, x, sigma = _small(name), _images(3, 3, 16, 16), SIGMAS[[0, 4, 9]].float()
    single = network(x, sigma)
    double = network.double()(x.double(), sigma.double())
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert (single - double).abs().max() < 1e-5 * double.abs().max()
    assert network(x.double(), sigma).dtype == torch.float64  # levels in float32, as training has them


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_autocast_is_near_float32_and_gives_float32(name):
    network, x, sigma = _small(name, width=16), _images(4, 3, 16, 16), SIGMAS[[0, 3, 6, 9]].float()
    expected = network(x, sigma)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x, sigma)
    assert out.dtype == torch.float32
    for one, reference in zip(out, expected, strict=True):
        assert (one - reference).norm() < 0.03 * reference.norm()
    with torch.autocast("cpu", torch.bfloat16):
        denoising_score_matching(network, x, sigma, torch.zeros_like(x)).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_near_float32_and_know_their_levels(name, dtype):
    network, x, sigma = _small(name, width=16), _images(10, 3, 16, 16), SIGMAS.float()
    expected = network(x, sigma)
    out = network.to(dtype)(x.to(dtype), sigma)
    assert out.dtype == dtype
    for one, reference in zip(out.float(), expected, strict=True):
        assert (one - reference).norm() < 0.05 * reference.norm()
    if isinstance(network, NCSN):
        assert torch.equal(network.sigmas, SIGMAS.float())
        assert torch.equal(network.double().sigmas, SIGMAS.float())


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_last_changes_nothing(name):
    network, x, sigma = _small(name), _images(2, 3, 16, 16), SIGMAS[[2, 7]].float()
    expected = network(x, sigma)
    out = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), sigma)
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_images_of_a_batch_do_not_see_each_other(name):
    network, x, sigma = _small(name).double(), _images(3, 3, 8, 8, dtype=torch.float64), SIGMAS[[1, 5, 8]]
    alone = torch.cat([network(x[k : k + 1], sigma[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(network(x, sigma), alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name", [name for name in NETWORKS if name not in ("ddpm", "ddpmpp")]
)  # theirs: test_ncsnpp.py
def test_without_rescale_the_data_come_rescaled(name):
    network, x, sigma = _small(name), _images(2, 3, 8, 8), SIGMAS[[2, 7]].float()
    plain = _small(name, rescale=False)
    plain.load_state_dict(network.state_dict())
    assert torch.equal(plain(2 * x - 1, sigma), network(x, sigma))
    assert not torch.equal(plain(x, sigma), network(x, sigma))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("act", ["elu", "relu", "lrelu", "swish"])
def test_a_network_travels_between_processes(name, act):
    network, x, sigma = _small(name, act=act), _images(1, 3, 8, 8), SIGMAS[[3]].float()
    assert torch.equal(pickle.loads(pickle.dumps(network))(x, sigma), network(x, sigma))


@pytest.mark.parametrize("network", [NCSNv2, NCSNv2Deeper, NCSNv2Deepest])
def test_sigma_divides_the_output_of_ncsnv2_and_does_nothing_else(network):
    network = network(channels=1, width=8).double()
    x = _images(2, 1, 8, 8, dtype=torch.float64)
    one, two = network(x, torch.ones(2).double()), network(x, torch.tensor([2.0, 0.5]).double())
    torch.testing.assert_close(two, one / torch.tensor([2.0, 0.5]).double()[:, None, None, None], rtol=1e-14, atol=0)


def test_ncsn_finds_its_level_in_spite_of_rounding_and_names_a_sigma_off_the_ladder():
    network, x = _small("ncsn"), _images(10, 3, 8, 8)
    exact = network(x, SIGMAS.float())
    assert torch.equal(network(x, (SIGMAS * (1 + 9e-4)).float()), exact)
    assert torch.equal(network(x, SIGMAS), exact)
    ladder = "10 levels from 1 to 0.01, got "
    for sigma, told in ((2.0, "2"), (0.005, "0.005"), (float(SIGMAS[4]) * 1.002, "0.129"), (float("nan"), "nan")):
        sigmas = SIGMAS.float()
        sigmas[3] = sigma
        with pytest.raises(ValueError, match=ladder + told):
            network(x, sigmas)
    with pytest.raises(ValueError, match=ladder + "-1"):
        network(x[:1], torch.tensor([-1.0]))


def test_ncsn_of_one_level_is_the_baseline_with_its_coefficients():
    baseline = RefineNet(channels=3, width=8).double()
    with torch.no_grad():
        for name, p in baseline.named_parameters():
            if name.endswith(("alpha", "gamma", "beta")):
                p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(len(name))))
    weights = baseline.state_dict()
    for name in [name.removesuffix(".gamma") for name in weights if name.endswith(".gamma")]:
        rows = [weights.pop(f"{name}.{part}") for part in ("gamma", "alpha", "beta")]
        weights[f"{name}.embed.weight"] = torch.cat(rows)[None]
    network = NCSN(channels=3, width=8, sigmas=[0.01]).double()
    network.load_state_dict(weights)
    x, sigma = _images(2, 3, 12, 8, dtype=torch.float64), torch.full((2,), 0.01, dtype=torch.float64)
    torch.testing.assert_close(network(x, sigma), baseline(x, sigma), rtol=1e-12, atol=1e-12)
    assert torch.equal(baseline(x, sigma), baseline(x, 7 * sigma))


def test_the_contrast_of_means_is_all_that_instance_norm_leaves_out():
    plus, plain = _small("ncsn_deeper").double(), _small("ncsn_deeper", norm="instance").double()
    weights = plus.state_dict()
    for name in [name for name in weights if name.endswith("embed.weight")]:
        gamma, alpha, beta = weights[name].chunk(3, dim=1)
        alpha.zero_()  # of `plus` too, whose memory it is
        weights[name] = torch.cat((gamma, beta), 1)
    plain.load_state_dict(weights)
    x = _images(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(plus(x, SIGMAS[:2]), plain(x, SIGMAS[:2]), rtol=1e-12, atol=1e-12)


def test_the_unet_sees_sigma_in_every_block_and_divides_by_it():
    network = _small("unet", width=6).double()
    x, sigma = _images(1, 3, 8, 8, dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    out = network(x, sigma)
    blocks = [module for name, module in network.named_modules() if name.endswith(".embed")]
    assert len(blocks) == 5
    grads = torch.autograd.grad(out.square().sum(), [block.weight for block in blocks])
    assert all(grad.norm() > 1e-6 for grad in grads)
    assert not torch.allclose(0.3 * out, 3 * network(x, 10 * sigma))
    for block in blocks:  # without what the embedding adds nothing but the division is left
        torch.nn.init.zeros_(block.weight)
    torch.testing.assert_close(0.3 * network(x, sigma), 3 * network(x, 10 * sigma), rtol=1e-12, atol=0)


def test_the_unet_takes_any_positive_sigma():
    network, x = _small("unet"), _images(5, 3, 8, 8)
    assert network(x, torch.tensor([1e-3, 0.01, 1.0, 50.0, 2e3])).isfinite().all()


@pytest.mark.parametrize("name", ["resscore", "refinenet"])
def test_networks_of_one_level_ignore_sigma(name):
    network, x = _small(name), _images(2, 3, 8, 8)
    assert torch.equal(network(x, torch.tensor([0.1, 5.0])), network(x, torch.ones(2)))


def test_the_toy_network_gives_the_official_losses():
    data, network = golden.toy()
    x, dsm = data["x"], data["dsm_single"]
    half_square = 0.5 * network(x, torch.ones(32)).square().sum(1).mean()
    assert half_square.item() == pytest.approx(float(data["ssm_vr_n1"]["loss1"]), rel=1e-5)
    sigma = torch.full((32,), dsm["sigma"])
    loss = (denoising_score_matching(network, x, sigma, dsm["z"]) / dsm["sigma"] ** 2).mean()  # unweighted
    assert loss.item() == pytest.approx(float(dsm["loss"]), rel=1e-5)
    with pytest.raises(ValueError, match=r"points of shape \(B, 2\), got \(4, 3\)"):
        network(torch.zeros(4, 3), torch.ones(4))
    with pytest.raises(ValueError, match=r"one sigma a point, shape \(4,\), got \(1,\)"):
        network(torch.zeros(4, 2), torch.ones(1))
    with pytest.raises(ValueError, match="width >= 1, got features=2, width=0"):
        MLP(width=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_bad_input_is_named(name):
    network = _small(name)
    m = network.multiple
    with pytest.raises(ValueError, match=rf"multiples of {m}, got \({m + 1}, {m}\)"):
        network(torch.rand(1, 3, m + 1, m), torch.ones(1))
    with pytest.raises(ValueError, match=r"images of shape \(B, 3, H, W\), got \(1, 1, 8, 8\)"):
        network(torch.rand(1, 1, 8, 8), torch.ones(1))
    with pytest.raises(ValueError, match=r"images of shape \(B, 3, H, W\), got \(3, 8, 8\)"):
        network(torch.rand(3, 8, 8), torch.ones(3))
    for sigma in (torch.ones(1), torch.ones(3, 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"one sigma an image, shape \(3,\), got"):
            network(torch.rand(3, 3, 8, 8), sigma)
    with pytest.raises(ValueError, match="width >= 2, got channels=3, width=1"):
        _small(name, width=1)
    with pytest.raises(ValueError, match="channels >= 1 and width >= 2, got channels=0"):
        _small(name, channels=0)
    with pytest.raises(ValueError, match=r"one of elu, relu, lrelu, swish, got 'gelu'"):
        _small(name, act="gelu")


@pytest.mark.parametrize(
    "sigmas", [[], [0.1, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0], torch.ones(2, 2)]
)
def test_ncsn_needs_a_ladder(sigmas):
    with pytest.raises(ValueError, match="finite sigmas that decrease strictly to a positive value"):
        NCSN(channels=1, width=4, sigmas=sigmas)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"sigmas that differ by more than 0\.1%"):
        NCSN(channels=1, width=4, sigmas=[1.0, 0.9995])
    with pytest.raises(ValueError, match=r"'instance\+\+' or 'instance', got 'batch'"):
        NCSNDeeper(channels=1, width=4, sigmas=[1.0], norm="batch")
    with pytest.raises(ValueError, match="multiple of 8, got 12"):
        ResScore(channels=1, width=12)
    with pytest.raises(ValueError, match=r"each >= 1, got \(1, 0\)"):
        UNet(channels=1, width=8, multipliers=(1, 0))
    with pytest.raises(ValueError, match=r"one multiplier or more, each >= 1, got \(\)"):
        UNet(channels=1, width=8, multipliers=())
