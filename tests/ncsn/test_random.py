"""The counter-based generator: published vectors, independence of batching, distribution."""

import math

import pytest
import torch

from ncsn import random


def _philox(counter, key):
    words = [torch.tensor([word], dtype=torch.int64) for word in counter]
    return [int(word) for word in random.philox(words, key)]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers of Random123 for philox4x32-10
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert _philox(counter, key) == expected


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7)])
def test_noise_of_an_image_does_not_depend_on_the_batch(shape):
    index = torch.arange(1000, 1037)
    whole = random.normal(7, random.STEP, index, 3, shape)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    assert torch.equal(random.normal(7, random.STEP, index[order], 3, shape), whole[order])
    for size in (1, 2, 5, 16):
        parts = [random.normal(7, random.STEP, part, 3, shape) for part in index.split(size)]
        assert torch.equal(torch.cat(parts), whole)
    noise = random.seeded_noise(7, index)
    assert torch.equal(noise(torch.empty(37, *shape), 3), whole)


def test_streams_keep_their_numbers():
    names = ["STEP", "START", "TRAIN_NOISE", "TRAIN_LEVEL", "TRAIN_FLIP", "KNOWN", "OTHER_END"]
    names += ["TRAIN_DIRECTION", "TRAIN_DEQUANTISE", "TRAIN_ORDER"]
    assert [getattr(random, name) for name in names] == list(range(10))


def test_noisy_images_start_at_the_data():
    index, data = torch.tensor([3, 9, 4]), torch.rand(3, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    start = random.noisy_images(0, index, data, 50.0)
    z = (start - data) / 50
    assert abs(z.mean()) < 5 / math.sqrt(1200)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / 1200)
    assert torch.equal(random.noisy_images(0, index[1:2], data[1:2], 50.0), start[1:2])
    assert torch.equal(random.noisy_images(0, index, data, 0.0), data)


def test_seed_stream_index_and_step_each_change_the_values():
    base = {"seed": 1, "stream": 0, "index": torch.tensor([5]), "step": 2}
    values = random.normal(**base, shape=(64,))
    for change in (
        {"seed": 2},
        {"stream": 1},
        {"index": torch.tensor([6])},
        {"step": 3},
        {"index": torch.tensor([5 + 2**32])},
    ):
        other = random.normal(**(base | change), shape=(64,))
        assert not (other == values).any()


def test_values_are_standard_normal():
    z = random.normal(0, random.STEP, torch.arange(2000), 0, (500,)).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov: sqrt(n) D > 1.95 has a chance of 1e-3
    x = z.flatten().sort().values
    cdf = 0.5 * torch.erfc(-x / 2**0.5)
    grid = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (cdf - grid).abs().max() * math.sqrt(n) < 1.95
    following = random.normal(0, random.STEP, torch.arange(2000), 1, (500,)).double()
    for a, b in ((z, following), (z[1:], z[:-1]), (z[:, 1:], z[:, :-1])):
        assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())


def test_uniform_covers_its_range():
    u = random.uniform(0, random.START, torch.arange(1000), 0, (1000,))
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 99 + 5 * math.sqrt(2 * 99)  # chi-squared with 99 degrees


def test_signs_are_independent_and_fair():
    v = random.signs(0, random.TRAIN_DIRECTION, torch.arange(2000), 0, (3, 100)).double()
    assert v.shape == (2000, 3, 100)
    assert set(v.unique().tolist()) == {-1, 1}
    for product in (v, v[1:] * v[:-1], v[:, 1:] * v[:, :-1], v[..., 1:] * v[..., :-1]):
        assert abs(product.mean()) < 5 / math.sqrt(product.numel())
    assert torch.equal(random.signs(0, random.TRAIN_DIRECTION, torch.tensor([7]), 0, (3, 100))[0].double(), v[7])


def test_out_of_range_seed_is_refused():
    with pytest.raises(ValueError, match=r"seed=4294967296"):
        random.normal(2**32, 0, torch.arange(2), 0, (4,))
    with pytest.raises(ValueError, match=r"step=-1"):
        random.normal(0, 0, torch.arange(2), -1, (4,))
