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


def _reference(counter, key):
    """Philox4x32-10 from its definition (Salmon et al. 2011, section 3.3), in whole numbers of any size."""
    for _ in range(10):
        (high_0, low_0), (high_1, low_1) = (
            divmod(multiplier * word, 2**32)
            for multiplier, word in ((0xD2511F53, counter[0]), (0xCD9E8D57, counter[2]))
        )
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0]
        key = (key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32
    return counter


def test_words_and_normals_are_those_of_a_second_implementation():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        *counter, k0, k1 = torch.randint(0, 2**32, (6,), generator=generator).tolist()
        assert _philox(counter, (k0, k1)) == _reference(counter, (k0, k1))
    seed, stream, step, numbers = 3_000_000_019, random.KNOWN, 1160, [0, 7, 49_999, 2**32 + 5, 2**62 + 1]
    found = random.normal(seed, stream, torch.tensor(numbers), step, (3, 5, 5))
    worst = 0.0
    for number, image in zip(numbers, found.flatten(1).tolist(), strict=True):
        expected = []
        for element in range(-(-75 // 4)):
            u = [w // 2**8 / 2**24 for w in _reference([element, number % 2**32, number >> 32, step], (seed, stream))]
            for a, b in (u[:2], u[2:]):
                radius = math.sqrt(-2 * math.log1p(-a))
                expected += [radius * math.cos(2 * math.pi * b), radius * math.sin(2 * math.pi * b)]
        worst = max(worst, *(abs(x - y) for x, y in zip(image, expected, strict=False)))
    assert worst < 2e-6  # float32: 4e-7 in the angle, of radii up to 5.8


@pytest.mark.parametrize("neighbours", ["element", "index", "step", "seed", "stream"])
def test_neighbouring_counters_have_unrelated_words(neighbours):
    """Of two neighbours, half of the bits differ, in each place; so do the words' bytes by the chi-squared test."""
    base = {"seed": 5, "stream": 2, "index": torch.arange(0, 2000, 2), "step": 8}
    if neighbours == "element":
        words = [w[:, :-1] for w in random.words(**base, n=84)], [w[:, 1:] for w in random.words(**base, n=84)]
    else:
        words = random.words(**base, n=80), random.words(**(base | {neighbours: base[neighbours] + 1}), n=80)
    one, other = (torch.stack([*each]).flatten(1) for each in words)  # (4, 20,000)
    n = one.shape[1]
    places = torch.arange(32)[:, None]
    for word in (one, other, one ^ other):
        balance = ((word[:, None] >> places) & 1).double().mean(-1)  # (4, 32)
        assert (balance - 0.5).abs().max() < 5 * 0.5 / math.sqrt(n)
        octets = torch.cat([(word >> shift) & 0xFF for shift in (0, 8, 16, 24)], 1)
        for row in octets:
            counts = torch.bincount(row, minlength=256).double()
            chi = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
            assert abs(chi - 255) < 5 * math.sqrt(2 * 255)


def test_words_collide_as_often_as_chance_has_it():
    """Birthdays: 2^18 words of 32 bits have 8 pairs in common on average, by Poisson's law."""
    words = torch.cat([w.flatten() for w in random.words(1, 0, torch.arange(2**12), 0, 64)])
    assert len(words) == 2**18
    pairs = len(words) - len(words.unique())
    assert abs(pairs - 8) < 5 * math.sqrt(8)


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
