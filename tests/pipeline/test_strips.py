"""Inpainting and interpolation with the graph's network, here an untrained one."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ncsn import images
from pipeline import prepare, schedule, strips, train
from pipeline._sampler import Drawer, Sampler


@pytest.fixture(params=images.SPACES)
def drawer(request, compose_params, workdir):
    return made(compose_params("experiment=tiny"), workdir, request.param)


def made(params, workdir, space, channels=1):
    torch.manual_seed(0)
    network = {"name": "ncsnv2", "channels": channels, "width": 4, "act": "elu"}
    save_file(train.build(network).state_dict(), workdir / "ema.safetensors")
    sampler = Sampler(
        network=network,
        space=space,
        shape=(channels, 8, 8),
        weights="ema",
        weights_sha256="0" * 64,
        step=12,
        method="annealed_langevin",
        schedule=schedule.choose(params.noise, torch.rand(20, 1, 8, 8)),
        denoise=True,
        precision="fp32",
        seed=5,
    )
    return Drawer.of(sampler, workdir / "ema.safetensors", params.runtime)


def _real(n):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_completions_keep_what_is_known_and_differ_in_the_rest(drawer):
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    reference = _real(1).expand(3, -1, -1, -1)
    x = strips.complete(drawer, reference, mask)
    assert torch.equal(x[..., :4], reference[..., :4])
    assert len({image[..., 4:].numpy().tobytes() for image in x}) == 3
    assert ((x >= 0) & (x <= 1)).all()


def test_what_is_known_is_put_in_as_the_network_sees_it(drawer, monkeypatch):
    seen = []
    monkeypatch.setattr(drawer, "pixels", lambda index, project, **_: seen.append(project) or _real(len(index)))
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    strips.complete(drawer, _real(2), mask)
    known = drawer.to_pixels(seen[0](drawer.to_space(torch.rand(2, 1, 8, 8)), 1e-6, 0))
    assert torch.allclose(known, _real(2), atol=1e-4)


def test_what_is_known_steers_the_rest(drawer):
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[..., :4] = True
    one, other = (strips.complete(drawer, reference, mask) for reference in (_real(2), 1 - _real(2)))
    assert not torch.equal(one[..., 4:], other[..., 4:])


def test_rows_begin_with_the_samples_of_the_graph(drawer):
    x = strips.between(drawer, 3, 4).unflatten(0, (3, 4))
    drawn = drawer.draw(torch.arange(3))
    difference = images.to_uint8(x[:, 0]).int() - drawn.int()
    assert difference.abs().max() <= 1  # float summation in another batch, then rounding
    assert len({row[-1].numpy().tobytes() for row in x}) == 3
    assert not torch.equal(x[:, 0], x[:, -1])


def test_grey_values_stay_and_the_colours_are_drawn(compose_params, workdir):
    """What is told is right to the last digit, and completions differ in what is not; by the score of Gaussian data."""
    drawer = made(compose_params("experiment=tiny", "noise.L=30"), workdir, "pixels", channels=3)
    drawer.model.score = lambda x, sigma: (0.5 - x) / (0.1**2 + sigma.view(-1, 1, 1, 1) ** 2)
    grey = (0.4 + 0.2 * _real(1)).expand(3, -1, -1, -1)
    x = strips.coloured(drawer, grey)
    inside = ((x > 0) & (x < 1)).all(1)  # elsewhere the range of pixels decides
    assert (x.mean(1) - grey[:, 0])[inside].abs().max() < 1e-5
    assert inside.double().mean() > 0.9
    assert len({image.numpy().tobytes() for image in x}) == 3
    prepare.OUT.mkdir(parents=True)
    np.save(prepare.OUT / "test.npy", images.to_uint8(torch.rand(5, 3, 8, 8)).numpy())
    found = strips.colourisation(drawer, workdir / "a.png", rows=2, times=3)
    assert 0 < found["measured"]["distance_among_completions"] < 64
    assert Image.open(workdir / "a.png").width > 300


class Brightness(torch.nn.Module):
    """Finds images of class 1 if they are bright."""

    def forward(self, x):
        return torch.stack([torch.zeros(len(x)), 40 * (x.mean((1, 2, 3)) - 0.5)], 1)


def test_a_classifier_leads_to_its_class(drawer):
    """From the same noise: brighter images where the bright class is asked for, in every space."""
    index, label = torch.arange(6).repeat(2), torch.arange(2).repeat_interleave(6)
    x = strips.of_classes(drawer, Brightness(), index, label, scale=1.0, spread=0.3)
    dark, bright = x.mean((1, 2, 3)).view(2, 6)
    assert (bright > dark).all()
    unguided = strips.of_classes(drawer, Brightness(), index, label, scale=0.0, spread=0.3)
    plain = drawer.pixels(torch.arange(6)).clamp(0, 1)
    assert torch.allclose(unguided, plain.repeat(2, 1, 1, 1), atol=1e-3)


def test_rows_of_classes_are_told_by_who_led_there_and_by_neighbours(drawer, workdir, monkeypatch):
    """Training images are dark and of class 0, or bright and of class 1: a nearest image knows its class."""
    prepare.OUT.mkdir(parents=True)
    labels = np.arange(12) % 2
    x = np.clip(labels[:, None, None, None] * 200 + np.random.default_rng(0).integers(0, 50, (12, 1, 8, 8)), 0, 255)
    for split in ("train", "test"):
        np.save(prepare.OUT / f"{split}.npy", x.astype(np.uint8))
        np.save(prepare.OUT / f"{split}_labels.npy", labels)
    monkeypatch.setattr(strips.features, "load_classifier", Brightness)
    found = strips.guided_classes(drawer, ["dark", "bright"], workdir / "c.png", columns=4)
    measured = found["measured"]
    assert measured["of_test_images"] == 1
    assert measured["without_guidance"] == 0.5  # whatever it is, it is one of the two that are asked for by turns
    assert 0 <= measured["by_the_nearest_image"] <= 1
    assert Image.open(workdir / "c.png").width > 300
    images_of_one = torch.full((3, 1, 8, 8), 0.9)
    assert strips.labels_of_nearest(images_of_one).tolist() == [1, 1, 1]


def test_strips_are_pictures_with_numbers(drawer, workdir):
    prepare.OUT.mkdir(parents=True)
    np.save(prepare.OUT / "test.npy", images.to_uint8(_real(5)).numpy())
    found = strips.inpainting(drawer, workdir / "a.png", rows=2, times=3)
    assert found["settings"]["test_images"] == [0, 4]
    assert Image.open(workdir / "a.png").width > 300
    between = strips.interpolation(drawer, workdir / "b.png", rows=2, columns=5)
    assert Image.open(workdir / "b.png").width > 300
    for number in (*found["measured"].values(), *between["measured"].values()):
        assert math.isfinite(number)
        assert number > 0


def test_one_completion_has_no_other_to_be_compared_with(drawer, workdir):
    prepare.OUT.mkdir(parents=True)
    np.save(prepare.OUT / "test.npy", images.to_uint8(_real(2)).numpy())
    assert strips.inpainting(drawer, workdir / "a.png", rows=2, times=1)["measured"]["distance_among_completions"] == 0


def test_without_a_network_the_error_says_what_to_run(params, workdir):
    from pipeline._stage import StageError

    with pytest.raises(StageError, match="does not exist: write it with `dvc repro train`"):
        strips.main(params)
