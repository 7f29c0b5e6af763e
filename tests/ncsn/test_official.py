"""Official checkpoints: files of both repositories give the official outputs and traces; nothing in a file is run."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from ncsn.losses import denoising_score_matching
from ncsn.networks import NCSN, NETWORKS, NCSNDeeper, NCSNv2, RefineNet
from ncsn.noise import geometric_sigmas
from ncsn.official import load, network_from_state_dict
from ncsn.training import TrainState, train_step

GOLDEN = Path(__file__).parent.parent / "golden"
SIGMAS = geometric_sigmas(1.0, 0.01, 10).float()
FILES = {"ncsn": "ncsn_checkpoint_3.pth", "ncsnv2": "ncsnv2_checkpoint_4.pth"}


def _trace(name):
    return torch.load(GOLDEN / f"{name}_train_trace.pt", weights_only=True)


def _states(name):
    return torch.load(GOLDEN / FILES[name], weights_only=True)


def _near(out, expected, tolerance=5e-6):
    return (out - expected).abs().max() < tolerance * expected.abs().max()


def test_a_file_of_2019_gives_the_official_output():
    trace = _trace("ncsn")
    checkpoint = load(GOLDEN / FILES["ncsn"], sigmas=trace["sigmas"])
    assert type(checkpoint.network) is NCSN
    assert not checkpoint.network.training
    assert (checkpoint.step, checkpoint.ema_network) == (None, None)
    out = checkpoint.network(trace["probe_x"], trace["sigmas"][trace["probe_labels"]])
    assert _near(out, trace["probe_out"])


def test_a_file_of_2020_gives_the_official_outputs_raw_and_averaged():
    trace = _trace("ncsnv2")
    checkpoint = load(str(GOLDEN / FILES["ncsnv2"]))
    assert type(checkpoint.network) is type(checkpoint.ema_network) is NCSNv2
    assert checkpoint.step == 4
    assert torch.equal(checkpoint.sigmas, trace["sigmas"])
    x, sigma = trace["probe_x"], trace["sigmas"][trace["probe_labels"]]
    assert _near(checkpoint.network(x, sigma), trace["probe_out_raw"])
    assert _near(checkpoint.ema_network(x, sigma), trace["probe_out_ema"])
    assert not _near(checkpoint.network(x, sigma), trace["probe_out_ema"], tolerance=1e-4)


def _displacement_error(initial, ours, official):
    """Distance from the official weights, relative to the way these went: an average goes a short one."""
    error = way = 0.0
    for (key, p), q in zip(ours.named_parameters(), official.parameters(), strict=True):
        error += float((p - q).detach().double().square().sum())
        way += float((q - initial[key]).detach().double().square().sum())
    assert way > 0
    return (error / way) ** 0.5


@pytest.mark.parametrize("name", FILES)
def test_training_reproduces_the_official_trace(name):
    trace = _trace(name)
    sigmas, settings = trace["sigmas"], trace["optimizer"]
    network = network_from_state_dict(trace["init_state_dict"], sigmas=sigmas).train()
    optimizer = torch.optim.Adam(
        network.parameters(), lr=settings["lr"], betas=tuple(settings["betas"]), eps=settings["eps"]
    )
    state = TrainState(network, optimizer, ema_decay=trace.get("ema_rate", 0.999), ema_warmup=False)
    initial = {key: value.clone() for key, value in network.named_parameters()}
    for x, level, z, loss in zip(trace["batches"], trace["labels"], trace["noises"], trace["losses"], strict=True):
        assert train_step(state, x, sigmas[level], z)[0].mean().item() == pytest.approx(float(loss), rel=1e-4)
    checkpoint = load(GOLDEN / FILES[name], sigmas=sigmas)
    pairs = [(network, checkpoint.network)]
    if checkpoint.ema_network is not None:
        pairs.append((state.ema.model, checkpoint.ema_network))
    for ours, official in pairs:
        assert _displacement_error(initial, ours, official) < 0.05
    x, sigma = trace["probe_x"], sigmas[trace["probe_labels"]]
    assert _near(network(x, sigma), trace.get("probe_out_raw", trace.get("probe_out")), tolerance=1e-3)
    for key, state in optimizer.state_dict()["state"].items():  # the same parameters in the same order
        for kind, value in checkpoint.optimizer["state"][key].items():
            assert (state[kind] - value).norm() <= 1e-2 * value.norm(), (key, kind)


@pytest.mark.parametrize("name", FILES)
def test_a_run_of_the_official_code_goes_on(name):
    trace = _trace(name)
    checkpoint = load(GOLDEN / FILES[name], sigmas=trace["sigmas"])
    optimizer = torch.optim.Adam(checkpoint.network.parameters())
    optimizer.load_state_dict(checkpoint.optimizer)
    assert optimizer.param_groups[0]["lr"] == trace["optimizer"]["lr"]
    x, sigma = trace["batches"][0], trace["sigmas"][trace["labels"][0]]
    before = denoising_score_matching(checkpoint.network, x, sigma, trace["noises"][0]).mean()
    before.backward()
    optimizer.step()
    assert denoising_score_matching(checkpoint.network, x, sigma, trace["noises"][0]).mean() < before
    assert all(int(state["step"]) == len(trace["losses"]) + 1 for state in optimizer.state.values())


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ncsn", {"sigmas": SIGMAS}),
        ("ncsn_deeper", {"sigmas": SIGMAS}),
        ("ncsn_deeper", {"sigmas": SIGMAS, "norm": "instance"}),
        ("ncsnv2", {}),
        ("ncsnv2_deeper", {}),
        ("ncsnv2_deepest", {}),
        ("refinenet", {}),
    ],
)
def test_weights_tell_their_network(name, arguments, prefix):
    network = NETWORKS[name](channels=1, width=6, **arguments)
    weights = {prefix + key: value for key, value in network.state_dict().items()}
    before = torch.get_rng_state()
    found = network_from_state_dict(weights, sigmas=SIGMAS)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(found) is type(network)
    x, sigma = torch.rand(2, 1, 8, 8), SIGMAS[[1, 8]]
    assert torch.equal(found(x, sigma), network(x, sigma))
    with torch.no_grad():
        network.begin_conv.weight.zero_()
    assert found.begin_conv.weight.abs().sum() > 0  # a copy


def test_what_weights_do_not_tell_is_said():
    network = NCSNv2(channels=1, width=4, act="swish", rescale=False)
    x, sigma = torch.rand(2, 1, 8, 8), torch.ones(2)
    for told in ({"rescaled": True}, {"logit_transform": True}):
        found = network_from_state_dict(network.state_dict(), nonlinearity="swish", **told)
        assert torch.equal(found(x, sigma), network(x, sigma))
    assert not torch.equal(
        network_from_state_dict(network.state_dict(), nonlinearity="swish")(x, sigma), found(x, sigma)
    )
    with pytest.raises(ValueError, match="one of elu, relu, lrelu, swish, got 'gelu'"):
        network_from_state_dict(network.state_dict(), nonlinearity="gelu")


def test_a_buffer_of_levels_is_taken_and_can_be_overruled():
    weights = NCSN(channels=1, width=4, sigmas=SIGMAS).state_dict()
    assert torch.equal(network_from_state_dict({"sigmas": SIGMAS} | weights).sigmas, SIGMAS)
    assert torch.equal(network_from_state_dict({"sigmas": SIGMAS} | weights, sigmas=2 * SIGMAS).sigmas, 2 * SIGMAS)


@pytest.mark.parametrize(("sigmas", "told"), [(None, "none"), ([1.0, 0.1], "2 of them")])
def test_ncsn_asks_for_its_levels(sigmas, told):
    with pytest.raises(ValueError, match=rf"sigmas=\.\.\., the 10 noise levels that NCSN was trained with.*got {told}"):
        load(GOLDEN / FILES["ncsn"], sigmas=sigmas)


def test_tensors_that_do_not_fit_are_named():
    weights = RefineNet(channels=1, width=4).state_dict()
    with pytest.raises(ValueError, match=r"315 tensors of RefineNet, got 1 missing: end_conv\.bias$"):
        network_from_state_dict({key: value for key, value in weights.items() if key != "end_conv.bias"})
    with pytest.raises(ValueError, match=r"got 4 unknown: a, b, c, \.\.\.$"):
        network_from_state_dict(weights | {key: torch.zeros(1) for key in "abcd"})
    with pytest.raises(ValueError, match=r"got 1 of the wrong shape: end_conv\.bias \(2,\) instead of \(1,\)"):
        network_from_state_dict(weights | {"end_conv.bias": torch.zeros(2)})
    renamed = {key.replace("res4", "stage4"): value for key, value in weights.items()}
    with pytest.raises(ValueError, match=r"got 22 missing: res4\.0\.conv1\.weight, .*; 22 unknown: stage4\.0\.conv1"):
        network_from_state_dict(renamed)
    with pytest.raises(ValueError, match=r"begin_conv\.weight among them, got 1 tensors: fc\.weight"):
        network_from_state_dict({"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="tensors by name, got 1 other entries: step"):
        network_from_state_dict(weights | {"step": 3})
    with pytest.raises(ValueError, match=r"normalizer\.embed\.weight of shape \(L, \.\.\.\), got \(\)"):
        network_from_state_dict(
            {"begin_conv.weight": torch.zeros(4, 1, 3, 3), "normalizer.embed.weight": torch.ones(())}
        )
    with pytest.raises(ValueError, match=r"of the wrong shape: normalizer\.embed\.weight"):
        weights = NCSNDeeper(channels=1, width=4, sigmas=SIGMAS).state_dict()
        network_from_state_dict(weights | {"normalizer.embed.weight": torch.zeros(10, 9)}, sigmas=SIGMAS)


def test_a_file_without_average_has_none(tmp_path):
    torch.save(_states("ncsnv2")[:4], tmp_path / "checkpoint.pth")
    checkpoint = load(tmp_path / "checkpoint.pth")
    assert (checkpoint.step, checkpoint.ema_network) == (4, None)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"model": {}}, "with a dict"),
        ([{}], r"with a list of 1: dict$"),
        ([{}, {}, 1], "with a list of 3: dict, dict, int"),
        ([{}, {}, "1", 2], r"with a list of 4: dict, dict, str, \.\.\."),
        ([{}, {}, 1, 2, 3], "with a list of 5"),
        (torch.zeros(3), "with a Tensor"),
    ],
)
def test_another_content_is_named(tmp_path, content, told):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"list \[network, optimizer\] or .*other\.pth " + told):
        load(tmp_path / "other.pth")


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", ["torch", "torch, old format", "pickle"])
def test_a_file_that_runs_code_is_refused_and_nothing_is_run(tmp_path, save):
    file, trap = tmp_path / "checkpoint_5000.pth", tmp_path / "trap"
    content = [*_states("ncsn"), _Bomb(trap)]
    if save == "pickle":
        file.write_bytes(pickle.dumps(content[2]))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=save == "torch")
    with pytest.raises(
        ValueError, match=r"got .*checkpoint_5000\.pth, which .* needs code to be run .*nothing of it was run"
    ):
        load(file, sigmas=SIGMAS)
    assert not trap.exists()
    if save != "pickle":  # it would have gone off
        torch.load(file, weights_only=False)
    else:
        pickle.loads(file.read_bytes())
    assert trap.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_is_no_checkpoint_is_named(tmp_path):
    whole = (GOLDEN / FILES["ncsn"]).read_bytes()
    noise = torch.randint(256, (4096,), generator=torch.Generator().manual_seed(0)).byte().numpy().tobytes()
    contents = [b"", b"\0" * 64, b"<html>not found</html>", b"PK\3\4", noise, whole[: len(whole) // 2], whole[9:]]
    contents += [b"\x80\x02" + noise[k : k + 64] for k in range(256)]
    for content in contents:
        (tmp_path / "file.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"expected .*file\.pth"):
            load(tmp_path / "file.pth")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_spoilt_file_ends_in_no_other_error(tmp_path, zipped):
    small = dict(list(_states("ncsnv2")[0].items())[:4])
    torch.save([small, {}, 0, 4], tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "file.pth").read_bytes()
    for k in range(0, len(whole), len(whole) // 120):
        spoilt = bytearray(whole)
        spoilt[k] ^= 0x5A
        (tmp_path / "file.pth").write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"^expected "):  # the few tensors make no network in any case
            load(tmp_path / "file.pth")
