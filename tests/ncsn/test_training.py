"""EMA, data order, draws, the training step: exact recursions, resume, the official trace's first losses."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from ncsn import optim
from ncsn.losses import annealed_sliced_score_matching, denoising_score_matching
from ncsn.networks import NCSNv2
from ncsn.noise import geometric_sigmas
from ncsn.training import EMA, TrainState, accumulate_gradients, data_order, train_draws, train_step, update

SIGMAS = geometric_sigmas(2.0, 0.1, 5)


def _state(network=None):
    torch.manual_seed(0)
    network = network or NCSNv2(channels=1, width=4)
    return TrainState(network, torch.optim.Adam(network.parameters(), lr=1e-3), ema_decay=0.99)


def _advance(state, steps, threads=1):
    losses = []
    while state.step < steps:
        index = torch.arange(state.step * 6, state.step * 6 + 6)
        level, z = train_draws(SIGMAS, torch.Size((1, 4, 4)), seed=1, index=index)
        x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(state.step))
        losses.append(train_step(state, x, SIGMAS[level].float(), z, threads=threads)[0])
    return losses


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_follows_its_recursion_and_copies_buffers(warmup):
    model = nn.BatchNorm1d(3)
    ema = EMA(model, 0.9, warmup=warmup)
    expected = model.weight.detach().clone()
    for n in range(1, 200):
        with torch.no_grad():
            model.weight.normal_(generator=torch.Generator().manual_seed(n))
            model.running_mean.fill_(n)
        ema.update(model)
        m = min(0.9, (1 + n) / (10 + n)) if warmup else 0.9
        expected = m * expected + (1 - m) * model.weight.detach()
        torch.testing.assert_close(ema.model.weight, expected)
    assert torch.equal(ema.model.running_mean, model.running_mean)
    assert not ema.model.weight.requires_grad


def test_ema_forgets_the_initial_weights_early():
    model = nn.Linear(4, 4, bias=False)
    start = model.weight.detach().clone()
    ema = EMA(model, 0.9999)
    with torch.no_grad():
        model.weight.add_(1)
    for _ in range(50):
        ema.update(model)
    average = ema.model.weight
    assert (average - model.weight).norm() < (average - start).norm()


def test_data_order_visits_every_image_once_an_epoch_and_any_part_agrees():
    whole = data_order(10, seed=3, first=0, count=35)
    for epoch in range(3):
        assert sorted(whole[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert not torch.equal(whole[:10], whole[10:20])
    parts = [data_order(10, seed=3, first=k, count=5) for k in range(0, 35, 5)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(data_order(10, seed=3, first=7, count=21), whole[7:28])


def test_every_bit_of_the_seed_counts_in_the_order():
    orders = {tuple(data_order(50, seed=s, first=0, count=50).tolist()) for s in (0, 1, 2, 3, 1234, 2**32 - 1)}
    assert len(orders) == 6
    # each image is as likely in each place: chi-squared with 49 degrees of freedom, images of the first place counted
    first = torch.cat([data_order(50, seed=s, first=50 * epoch, count=1) for s in range(50) for epoch in range(20)])
    assert ((torch.bincount(first, minlength=50) - 20.0) ** 2 / 20).sum() < 49 + 5 * 98**0.5
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"seed and step in \[0, 2\^32\), got seed={seed}"):
            data_order(50, seed=seed, first=0, count=1)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_the_order_of_sums_alone(threads):
    one, many, again = _state(), _state(), _state()
    for step in range(3):
        batch = torch.rand(7, 1, 4, 4), torch.rand(7) + 0.1, torch.randn(7, 1, 4, 4)
        losses = [train_step(state, *batch, threads=n)[0] for state, n in ((one, 1), (many, threads), (again, threads))]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4 if step else 1e-6, atol=0)
        assert torch.equal(losses[1], losses[2])
        if step == 0:  # before the weights part; Adam would hide a factor
            _same_gradients(many.model, one.model)
    for a, b in zip(many.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduced", [True, False])
def test_sliced_score_matching_in_threads_moves_the_weights_as_without(reduced):
    """Its gradients lie otherwise in memory than channels_last weights, which torch's fused Adam does not look at."""

    def objective(score, x, sigma, z, v):
        return annealed_sliced_score_matching(score, x, sigma, z, v.transpose(0, 1), variance_reduced=reduced)

    x, z = torch.rand(8, 1, 8, 8), torch.randn(8, 1, 8, 8)
    v = torch.randn(8, 1, 1, 8, 8).sign()
    states = []
    for threads in (1, 2):
        torch.manual_seed(0)
        network = NCSNv2(channels=1, width=8).to(memory_format=torch.channels_last)
        state = TrainState(network, torch.optim.Adam(network.parameters(), lr=1e-3, eps=1.0, fused=True), ema_decay=0.9)
        train_step(state, x, torch.linspace(0.1, 1, 8), z, v, objective=objective, threads=threads)
        states.append(state)
    torch.manual_seed(0)
    start = NCSNv2(channels=1, width=8).state_dict()
    one, two = (state.model.state_dict() for state in states)
    for name, first in start.items():
        moved = (one[name] - first).abs().max().item()
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-3 * moved + 1e-9)


def _same_gradients(model, other):
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    largest = max(float(b.grad.abs().max()) for _, b in pairs if b.grad is not None)
    assert largest > 0
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5 * largest)


def test_threads_compute_in_the_precision_of_their_caller():
    seen = []

    def objective(score, x, sigma, z):
        seen.append(nn.functional.linear(x.flatten(1), torch.ones(2, 16)).dtype)
        return denoising_score_matching(score, x, sigma, z)

    batch = torch.rand(4, 1, 4, 4), torch.rand(4) + 0.1, torch.randn(4, 1, 4, 4)
    one, many = _state(), _state()
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = train_step(one, *batch, objective=objective)
        got, _ = train_step(many, *batch, objective=objective, threads=2)
    assert seen == [torch.bfloat16] * 3
    assert torch.equal(got, expected)
    seen.clear()
    train_step(many, *batch, objective=objective, threads=2)
    assert seen == [torch.float32] * 2


@pytest.mark.parametrize("threads", [1, 2])
def test_parameters_that_are_frozen_or_unused_get_no_gradient(threads):
    network = NCSNv2(channels=1, width=4)
    network.unused = nn.Parameter(torch.ones(3))
    network.begin_conv.requires_grad_(False)
    state, before = _state(network), copy.deepcopy(network.state_dict())
    _advance(state, 2, threads=threads)
    kept = {"unused", "begin_conv.weight", "begin_conv.bias"}
    assert {name for name, p in network.named_parameters() if p.grad is None} == kept
    assert {name for name, value in network.state_dict().items() if torch.equal(value, before[name])} == kept
    again = NCSNv2(channels=1, width=4)
    again.unused = nn.Parameter(torch.zeros(3))
    again = _state(again)
    again.load_state_dict(state.state_dict())
    assert again.state_dict().keys() == state.state_dict().keys()


@pytest.mark.parametrize("threads", [0, 3])
def test_a_number_of_threads_that_the_batch_cannot_feed_is_refused(threads):
    with pytest.raises(ValueError, match=rf"1 <= threads <= 2, the examples of the batch, got threads={threads}"):
        train_step(_state(), torch.rand(2, 1, 4, 4), torch.ones(2), torch.zeros(2, 1, 4, 4), threads=threads)


def test_any_run_of_samples_covers_the_levels_evenly():
    for first in (0, 12_345, 2**40):
        for count in (20, 64, 500):
            level, _ = train_draws(SIGMAS, torch.Size((1, 1, 1)), seed=1, index=torch.arange(first, first + count))
            counts = torch.bincount(level, minlength=5)
            assert (counts - count / 5).abs().max() <= 2
    one, other = (train_draws(SIGMAS, torch.Size((1, 1, 1)), seed=s, index=torch.arange(20))[0] for s in (0, 1))
    assert not torch.equal(one, other)


def test_a_power_favours_the_small_levels():
    level, _ = train_draws(SIGMAS, torch.Size((1, 1, 1)), seed=0, index=torch.arange(10_000), level_power=0.5)
    share = torch.bincount(level, minlength=5) / 10_000
    edges = (torch.arange(6) / 5) ** 2
    torch.testing.assert_close(share, edges[1:] - edges[:-1], rtol=0, atol=5e-4)


def test_draws_belong_to_the_sample_and_cover_the_levels_evenly():
    index = torch.arange(10_000)
    level, z = train_draws(SIGMAS, torch.Size((1, 2, 2)), seed=0, index=index)
    part_level, part_z = train_draws(SIGMAS, torch.Size((1, 2, 2)), seed=0, index=index[100:107])
    assert torch.equal(part_level, level[100:107])
    assert torch.equal(part_z, z[100:107])
    counts = torch.bincount(level, minlength=5).double()
    assert ((counts - 2000) ** 2 / 2000).sum() < 4 + 5 * 8**0.5


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_an_optimizer_is_torchs_to_the_bit_and_reads_its_state(name):
    def trained(kind, loaded=None):
        torch.manual_seed(0)
        network = nn.Linear(3, 2)
        optimizer = kind(network.parameters(), lr=0.1)
        if loaded is not None:
            optimizer.load_state_dict(copy.deepcopy(loaded))
        for _ in range(3):
            optimizer.zero_grad()
            network(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
        return [*network.parameters()], optimizer.state_dict()

    mine, torchs = getattr(optim, name), getattr(torch.optim, name)
    weights, state = trained(mine)
    for got, expected in ((trained(mine), trained(torchs)), (trained(torchs, state), trained(mine, state))):
        assert all(torch.equal(*pair) for pair in zip(got[0], expected[0], strict=True))
        assert got[1]["param_groups"] == expected[1]["param_groups"]
        assert all(torch.equal(*(each[1]["state"][k]["exp_avg_sq"] for each in (got, expected))) for k in (0, 1))
    assert not torch.equal(weights[0], trained(mine, state)[0][0])


def test_training_loads_no_compiler():
    code = """
import sys, torch
from ncsn.networks import NCSNv2
from ncsn.optim import Adam
from ncsn.training import TrainState, train_step
network = NCSNv2(channels=1, width=4)
state = TrainState(network, Adam(network.parameters(), fused=True), ema_decay=0.99)
x = torch.rand(2, 1, 4, 4)
train_step(state, x, torch.ones(2), torch.randn_like(x))
state.load_state_dict(state.state_dict())
print(state.step, sorted(sys.modules.keys() & {"torch._dynamo", "torch._inductor", "triton", "sympy"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1 []\n"


def test_loss_falls():
    losses = _advance(_state(), 60)
    first, last = torch.cat(losses[:10]).mean(), torch.cat(losses[-10:]).mean()
    assert last < 0.8 * first


def test_a_state_that_was_saved_goes_on_to_the_same_bits():
    unbroken = _state()
    _advance(unbroken, 7)
    first = _state()
    _advance(first, 4)
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second = _state()
    second.load_state_dict(saved)
    assert second.step == 4
    _advance(second, 7)
    expected, got = unbroken.state_dict(), second.state_dict()
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model.begin_conv.weight": None}, r"1 missing: model\.begin_conv\.weight$"),
        ({"ema.end_conv.bias": None, "step": None}, r"2 missing: ema\.end_conv\.bias, step$"),
        ({"ema.end_conv.bias": torch.zeros(2)}, r"wrong shape: ema\.end_conv\.bias \(2,\) instead of \(1,\)"),
        ({"step": torch.zeros(2)}, r"wrong shape: step \(2,\) instead of \(\)"),
        ({"optimizer.exp_avg.end_conv.bias": None}, r"1 missing: optimizer\.exp_avg\.end_conv\.bias$"),
        ({"optimizer.exp_avg.end_conv.weight": torch.zeros(1)}, r"wrong shape: optimizer\.exp_avg\.end_conv\.weight"),
        ({"optimizer.exp_avg.end_conv.weight": torch.zeros(())}, r"wrong shape: optimizer\.exp_avg\.end_conv\.weight"),
        ({"optimizer.step.end_conv.bias": torch.zeros(1)}, r"wrong shape: optimizer\.step\."),
        ({"optimizer.exp_avg.other": torch.zeros(1)}, r"1 unknown: optimizer\.exp_avg\.other$"),
        ({"curves": torch.zeros(1)}, r"1 unknown: curves$"),
        ("end_conv.bias", r"459 tensors of the optimizer, got 456$"),
        ("exp_avg_sq", r"459 tensors of the optimizer, got 306$"),
        ("optimizer", r"459 tensors of the optimizer, got 0$"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(change, told):
    state = _state()
    _advance(state, 1)
    tensors = dict(state.state_dict())
    if isinstance(change, str):
        gone = [key for key in tensors if key.startswith("optimizer.") and change in key]
        change = dict.fromkeys(gone)
    tensors = {key: value for key, value in (tensors | change).items() if value is not None}
    other = _state()
    _advance(other, 2)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=told):
        other.load_state_dict(tensors)
    after = other.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("micro_batch", [1, 3, 7, 100])
@pytest.mark.parametrize("threads", [1, 2])
def test_micro_batches_give_the_same_update(micro_batch, threads):
    batch = torch.rand(7, 1, 4, 4), torch.rand(7) + 0.1, torch.randn(7, 1, 4, 4)
    whole, parts, seen = _state(), _state(), []

    def objective(score, x, sigma, z):
        seen.append(len(x))
        return denoising_score_matching(score, x, sigma, z)

    threads = min(threads, micro_batch)
    expected, norm = train_step(whole, *batch)
    got, other_norm = train_step(parts, *batch, micro_batch=micro_batch, threads=threads, objective=objective)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(other_norm, norm, rtol=1e-5, atol=0)
    _same_gradients(parts.model, whole.model)
    assert sum(seen) == 7
    assert max(seen) <= micro_batch


def test_shares_of_a_batch_add_up_to_its_gradient():
    batch = torch.rand(7, 1, 4, 4), torch.rand(7) + 0.1, torch.randn(7, 1, 4, 4)
    whole, one, other, losses = _state(), _state(), _state(), []
    train_step(whole, *batch)
    for state, rows in ((one, slice(0, 3)), (other, slice(3, 7))):
        losses.append(accumulate_gradients(state, *(tensor[rows] for tensor in batch), total=7))
    others = [*(parameter.grad for parameter in other.model.parameters()), losses[1].sum()]
    update(one, losses[0], lambda tensors: [mine.add_(its) for mine, its in zip(tensors, others, strict=True)])
    _same_gradients(one.model, whole.model)
    assert one.step == 1


@pytest.mark.parametrize("fused", [True, False])
def test_a_long_gradient_is_shortened_to_the_norm(fused):
    """By plain descent the weights move by rate times gradient: as far as the norm allows, in the same direction."""
    batch = torch.rand(3, 1, 4, 4), torch.rand(3) + 0.1, torch.randn(3, 1, 4, 4)

    def weights(state):
        return torch.nn.utils.parameters_to_vector(state.model.parameters()).detach().clone()

    moves = []
    for clip_norm in (None, 1e6, 0.25):
        state = _state()
        state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1e-3, fused=fused)
        before = weights(state)
        loss = accumulate_gradients(state, *batch)
        norm = float(update(state, loss, clip_norm=clip_norm))
        moves.append(weights(state) - before)
    assert norm > 1
    assert torch.equal(moves[1], moves[0])
    assert torch.allclose(moves[2], moves[0] * 0.25 / norm, atol=1e-6)
    assert float(moves[2].norm()) == pytest.approx(0.25e-3, rel=1e-3)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("in_loss_alone", [True, False])
def test_a_step_with_a_loss_or_gradient_that_is_not_finite_is_skipped(fused, bad, in_loss_alone):
    torch.manual_seed(0)
    network = NCSNv2(channels=1, width=4)
    state = TrainState(network, torch.optim.Adam(network.parameters(), lr=1e-3, fused=fused), ema_decay=0.99)
    _advance(state, 3)
    kept = {key: value.clone() for key, value in state.state_dict().items() if not key.startswith(("ema.", "step"))}
    x = torch.zeros(2, 1, 4, 4)
    if not in_loss_alone:
        x[1, 0, 0, 0] = bad

    def objective(score, x, sigma, z):
        loss = denoising_score_matching(score, x, sigma, z)
        return loss + torch.tensor([0, bad if in_loss_alone else 0])

    loss, norm = train_step(state, x, torch.tensor([1.0, 0.5]), torch.zeros_like(x), objective=objective)
    assert loss.isfinite().tolist() == [True, False]
    assert not norm.isfinite()
    after = state.state_dict()
    assert all(torch.equal(after[key], value) for key, value in kept.items() if key != "ema_updates")
    assert state.step == 4
    assert all(value.isfinite().all() for value in after.values())
    _advance(state, 6)
    assert not torch.equal(state.state_dict()["model.end_conv.bias"], kept["model.end_conv.bias"])
