"""The networks of the SDE family: the official outputs, resampling, what checkpoints of the official code give."""

import math

import pytest
import torch

from ncsn import official, random, samplers
from ncsn.losses import continuous_score_matching
from ncsn.networks import DDPM, DDPMpp, NCSNpp, ncsnpp
from ncsn.sde import SDES, VP
from tests.ncsn.golden import diffusion

NAMES = ("ve_cont_ncsnpp", "vp_cont_ddpmpp", "ve_disc_ncsnpp")
each_network = pytest.mark.parametrize("name", NAMES)
SMALL = {"channels": 1, "width": 8, "multipliers": (1, 2), "blocks": 1, "dropout": 0.0}


def output(name, golden, network):
    """What the official network returns: under VP the noise, with the sign of theirs, else the score."""
    x, labels = golden["x"], golden["labels"]
    with torch.no_grad():
        if name == "vp_cont_ddpmpp":
            return network.unet(x, labels)
        return network(x, labels if golden["continuous"] else network.sigmas[labels].float())


def written(golden, path, averages=None):
    """A file as score_sde_pytorch saves it; the average is of what is trained, so not of the frequencies."""
    weights = {f"module.{key}": value for key, value in golden["state_dict"].items()}
    trained = [value for key, value in golden["state_dict"].items() if key != "sigmas" and key != "all_modules.0.W"]
    ema = {"decay": 0.999, "num_updates": 7, "shadow_params": averages or [value + 1 for value in trained]}
    torch.save({"optimizer": {"state": {}}, "model": weights, "ema": ema, "step": 7}, path)
    return path


@each_network
def test_official_outputs_from_a_checkpoint(name, tmp_path):
    golden, network = diffusion(name)
    found = official.load_diffusion(written(golden, tmp_path / "checkpoint_1.pth"), network)
    assert found.step == 7
    close = (output(name, golden, found.network) - golden["out"]).abs().max()
    assert close < 1e-5 * golden["out"].abs().max()
    for (key, raw), average in zip(found.network.named_parameters(), found.ema_network.parameters(), strict=True):
        assert torch.equal(average, raw + 1 if raw.requires_grad else raw), key
    assert torch.equal(found.sigmas, golden["state_dict"]["sigmas"])


@pytest.mark.parametrize("network", [NCSNpp, DDPMpp, DDPM])
def test_every_weight_matters(network):
    """The golden outputs do not see the inside of blocks, whose last weights are 1e-6 in them; here they are not."""
    torch.manual_seed(0)
    net = network(**SMALL).double().eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, sigma = torch.rand(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0.5, 3.0], dtype=torch.float64)
    trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(net(x, sigma).square().sum(), list(trained.values()))
    blind = [name for name, gradient in zip(trained, gradients, strict=True) if gradient.abs().max() < 1e-8]
    # a constant added to all keys of a softmax changes nothing
    assert [name for name in blind if not name.endswith("attention.key.bias")] == []


@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_a_block_is_what_the_paper_draws(resample):
    """Written down once more, from arXiv:2011.13456, figure 13, and the official order, with other means."""
    torch.manual_seed(0)
    way = {} if resample is None else {resample: "mean"}
    block = ncsnpp.ResBlock(4, 8, features=6, dropout=0.0, act="swish", rescale_skips=True, **way).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x, e = torch.randn(2, 4, 6, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)

    def norm(value, layer):
        groups = value.shape[1] // 4
        parts = value.view(2, groups, -1)
        parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return parts.view_as(value) * layer.weight[:, None, None] + layer.bias[:, None, None]

    def swish(value):
        return value * value.sigmoid()

    def moved(value):
        if resample == "up":
            return value.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return value.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)) if resample == "down" else value

    def conv(value, layer):
        size, pad = value.shape[2:], layer.padding
        columns = torch.nn.functional.unfold(value, layer.kernel_size, padding=pad)
        return (layer.weight.flatten(1) @ columns + layer.bias[:, None]).view(2, -1, *size)

    h = conv(moved(swish(norm(x, block.norm1))), block.conv1)
    h = h + (swish(e) @ block.embed.weight.T + block.embed.bias)[:, :, None, None]
    h = conv(swish(norm(h, block.norm2)), block.conv2)
    expected = (conv(moved(x), block.shortcut) + h) / 2**0.5
    assert torch.allclose(block(x, e), expected)


def test_attention_is_over_all_pixels():
    torch.manual_seed(0)
    attention = ncsnpp.Attention(8, rescale_skips=True).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    h = attention.norm(x)

    def each(layer, value):
        return torch.einsum("oi,bihw->bohw", layer.weight[:, :, 0, 0], value) + layer.bias[:, None, None]

    q, k, v = each(attention.query, h), each(attention.key, h), each(attention.value, h)
    weights = torch.einsum("bchw,bcij->bhwij", q, k) / 8**0.5
    weights = weights.flatten(3).softmax(3).view_as(weights)
    found = torch.einsum("bhwij,bcij->bchw", weights, v)
    assert torch.allclose(attention(x), (x + each(attention.out, found)) / 2**0.5)


def test_embeddings():
    """Of t = 0 and of sigma = 1 all sines are 0 and cosines 1; frequencies fall from 1 to 1 / 10,000."""
    label = torch.tensor([0.0, 3.0])
    zero, three = ncsnpp.Positional(6)(label)
    assert zero.tolist() == [0, 0, 0, 1, 1, 1]
    expected = [f(3.0 * w) for f in (math.sin, math.cos) for w in (1, 0.01, 0.0001)]
    assert three.tolist() == pytest.approx(expected, abs=1e-6)
    fourier = ncsnpp.Fourier(2)
    with torch.no_grad():
        fourier.W.copy_(torch.tensor([1.0, 0.25]))
    one, e = fourier(torch.tensor([1.0, math.e]))
    assert one.tolist() == [0, 0, 1, 1]
    assert e.tolist() == pytest.approx([0, 1, 1, 0], abs=1e-5)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    golden, network = diffusion("ve_cont_ncsnpp")
    path = written(golden, tmp_path / "checkpoint_1.pth")
    with pytest.raises(ValueError, match=r"expected the \d+ weights of NCSNpp as it was built, got 157: its blocks"):
        official.load_diffusion(path, NCSNpp(channels=3, width=16, multipliers=(1, 2), blocks=2))
    with pytest.raises(ValueError, match=r"expected weights of the shape \(8,\) for unet.embedding.W of NCSNpp"):
        official.load_diffusion(path, NCSNpp(channels=3, width=8, multipliers=(1, 2), blocks=1))
    with pytest.raises(ValueError, match=r"expected the \d+ averages of NCSNpp"):
        official.load_diffusion(written(golden, path, [torch.zeros(3)]), network)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="expected a dictionary with model, ema, optimizer and step"):
        official.load_diffusion(path, network)


def test_resampling_by_a_filter_keeps_constants_and_means():
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    up = ncsnpp.upsampled(x, "fir")
    assert up.shape == (2, 3, 16, 16)
    inside = (..., slice(2, -2), slice(2, -2))
    assert torch.allclose(ncsnpp.upsampled(torch.ones_like(x), "fir")[inside], torch.ones(1, dtype=torch.float64))
    assert torch.allclose(ncsnpp.downsampled(torch.ones_like(x), "fir")[..., 1:-1, 1:-1], torch.ones(1).double())
    # the two are adjoint but for the factor 4, so that neither moves the image
    y = torch.rand_like(up)
    assert torch.allclose((up * y).sum(), 4 * (x * ncsnpp.downsampled(y, "fir")).sum())


@pytest.mark.parametrize("name", ["vp", "subvp"])
@pytest.mark.parametrize("network", [DDPMpp, DDPM])
def test_a_network_that_predicts_noise_has_its_loss(network, name):
    """In pixels of [0, 1] the noise level is half of the SDE's: the loss is that of the noise, 0.5 ||n - z||^2."""
    torch.manual_seed(0)
    sde, net = SDES[name](), network(**SMALL, sde=name)
    torch.nn.init.normal_(net.unet.end_conv.weight)
    x, z = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 8, 8)
    t = torch.tensor([0.01, 0.3, 0.7, 1.0], dtype=torch.float64)
    alpha, sigma = (value.view(-1, 1, 1, 1).float() for value in sde.scales(t))
    noise = net.unet(alpha * (2 * x - 1) + sigma * z, 999 * t)
    expected = 0.5 * (noise - z).square().flatten(1).sum(1)
    plain = network(**SMALL, sde=name, rescale=False)
    plain.load_state_dict(net.state_dict())
    found = continuous_score_matching(plain, sde, 2 * x - 1, t, z)
    assert torch.allclose(found, expected, rtol=1e-3)
    pixels = (sde.noise_level(t) / 2).float()
    shape = (-1, 1, 1, 1)
    residual = pixels.view(shape) * net(x + pixels.view(shape) * z, pixels) + z
    assert torch.allclose(0.5 * residual.square().flatten(1).sum(1), expected, rtol=1e-3)


def test_labels_of_a_chain_are_the_numbers_of_its_steps():
    net = DDPMpp(**SMALL, steps=100, rescale=False)
    seen = []
    net.unet.forward = lambda x, label: seen.append(label) or x
    levels = VP().levels(100).flip(0).float()
    net(torch.zeros(100, 1, 8, 8), levels)
    assert torch.equal(seen[0], torch.arange(100))


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: DDPMpp(**SMALL, sde="ve"), "expected sde='vp' or 'subvp' for a network that predicts noise, got 've'"),
        (lambda: DDPMpp(**SMALL, sde="subvp", steps=10), "expected VE or VP, which have the chains"),
        (lambda: DDPMpp(**SMALL, steps=10), "expected more steps than beta_max=20 under VP, got steps=10"),
        (lambda: NCSNpp(**SMALL | {"attention": (2,)}), r"expected attention at sizes of 0, 1, got \(2,\)"),
        (lambda: NCSNpp(**SMALL | {"dropout": 1.0}), "expected 0 <= dropout < 1, got 1.0"),
        (lambda: NCSNpp(**SMALL | {"blocks": 0}), "expected multipliers and blocks >= 1"),
        (lambda: DDPMpp(**SMALL | {"width": 7}), "expected an even width >= 4, got 7"),
    ],
)
def test_what_cannot_be_is_refused(build, told):
    with pytest.raises(ValueError, match=told):
        build()


@pytest.mark.parametrize("network", [NCSNpp, DDPMpp, DDPM])
def test_images_do_not_depend_on_their_batch_and_samplers_take_the_network(network):
    torch.manual_seed(0)
    net = network(**SMALL).eval()
    torch.nn.init.normal_(net.unet.end_conv.weight)
    index = torch.arange(3)
    x = 5 * random.normal(0, random.START, index, 0, (1, 8, 8))
    sigmas = torch.tensor([5.0, 1.0, 0.1])
    together = samplers.probability_flow(net, x, sigmas)
    assert torch.allclose(together[1:2], samplers.probability_flow(net, x[1:2], sigmas), atol=1e-4)
    assert together.isfinite().all()
