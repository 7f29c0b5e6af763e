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
    torch.manual_seed(0)
    network = {"name": "ncsnv2", "channels": 1, "width": 4, "act": "elu"}
    save_file(train.build(network).state_dict(), workdir / "ema.safetensors")
    params = compose_params("experiment=tiny")
    sampler = Sampler(
        network=network,
        space=request.param,
        shape=(1, 8, 8),
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
