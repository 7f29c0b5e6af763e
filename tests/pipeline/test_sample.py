"""The sampling stage: shards that do not depend on who draws them, in this process and on Ray workers."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline import _ray, sample, schedule, train
from pipeline._stage import StageError
from pipeline._store import read_json, sha256, write_json


@pytest.fixture
def sampler(compose_params, tmp_path):
    params = compose_params("experiment=tiny")
    torch.manual_seed(0)
    network = {"name": "ncsnv2", "channels": 1, "width": 4, "act": "elu"}
    save_file(train.build(network).state_dict(), tmp_path / "ema.safetensors")
    levels = schedule.choose(params.noise, torch.rand(20, 1, 8, 8))
    return sample.Sampler(
        network=network,
        weights=tmp_path / "ema.safetensors",
        weights_sha256="0" * 64,
        step=12,
        schedule=levels,
        shape=(1, 8, 8),
        denoise=True,
        seed=5,
        folder=tmp_path / "shards",
    )


def _close(a, b):
    """Equal up to one grey level in a few places: float summation in another order, then rounding."""
    difference = np.abs(a.astype(int) - b.astype(int))
    return difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_images_do_not_depend_on_the_batch(sampler):
    drawer = sample.Drawer(sampler)
    whole = drawer.draw(torch.arange(12)).numpy()
    parts = torch.cat([drawer.draw(part) for part in torch.arange(12).split(5)]).numpy()
    assert whole.shape == (12, 1, 8, 8)
    assert _close(whole, parts)
    assert len({image.tobytes() for image in whole}) == 12


def test_shards_cover_the_images_in_fixed_blocks():
    assert sample.shards(40, 16) == [(0, 16), (16, 32), (32, 40)]
    assert sample.shards(32, 16) == sample.shards(40, 16)[:2]


def test_images_of_another_size_are_other_samples(compose_params, workdir, monkeypatch):
    network = {"name": "ncsnv2", "channels": 1, "width": 4, "act": "elu"}
    hashes = {"ema": "0" * 64, "initial": "1" * 64}
    write_json(train.OUT / "model.json", {"network": network, "space": "pixels", "step": 12, "sha256": hashes})
    params = compose_params("experiment=tiny")
    write_json(schedule.OUT / "schedule.json", schedule.choose(params.noise, torch.rand(20, 1, 8, 8)))

    def folder(shape, kind="ema"):
        monkeypatch.setattr(sample.prepare, "manifest", lambda: {"shape": shape})
        return sample.make_sampler(params, kind).folder

    assert folder([1, 8, 8]) == folder([1, 8, 8])
    assert len({folder([1, 8, 8]), folder([1, 16, 16]), folder([1, 8, 8], "untrained")}) == 3


def test_a_shard_is_drawn_once_and_a_damaged_one_again(sampler, caplog):
    shard = (3, 7)
    assert not sample.is_done(sampler.folder, shard)
    sample.Drawer(sampler)(shard)
    assert sample.is_done(sampler.folder, shard)
    path = sample.shard_path(sampler.folder, shard)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert not sample.is_done(sampler.folder, shard)
    assert "is damaged and drawn again" in caplog.text
    sample.Drawer(sampler)(shard)
    assert path.read_bytes() == good
    assert sorted(p.name for p in sampler.folder.iterdir()) == ["shard_000003_000007.json", "shard_000003_000007.npy"]


def test_images_that_diverge_are_named_and_not_stored(sampler):
    sampler = _diverging(sampler)
    with pytest.raises(StageError, match=r"not finite with noise.epsilon=1e\+38 \(Langevin .* 2 sigma_L\^2 = 0.005 on"):
        sample.Drawer(sampler)((0, 2))
    assert list(sampler.folder.iterdir()) == []


def test_the_manifest_describes_the_shards(sampler, tmp_path):
    blocks = sample.shards(10, 4)
    for block in blocks:
        sample.Drawer(sampler)(block)
    sample.publish(sampler, blocks, tmp_path / "out")
    manifest = sample.manifest(tmp_path / "out")
    assert manifest["n"] == 10
    assert manifest["nfe"] == sampler.schedule["L"] * sampler.schedule["steps_per_level"] + 1
    assert [(s["first"], s["last"]) for s in manifest["shards"]] == [(0, 3), (4, 7), (8, 9)]
    for entry in manifest["shards"]:
        assert sha256(tmp_path / "out" / entry["file"]) == entry["sha256"]
    images = sample.load(tmp_path / "out")
    assert images.shape == (10, 1, 8, 8)
    assert _close(images, sample.Drawer(sampler).draw(torch.arange(10)).numpy())


def test_the_animation_ends_with_the_samples(sampler, tmp_path, monkeypatch):
    frames = sample.animate(sampler, 6)
    assert len(frames) == sampler.schedule["L"] + 1
    assert _close(frames[-1].numpy(), sample.Drawer(sampler).draw(torch.arange(6)).numpy())
    at_level = [frame.numpy() for frame in frames]
    monkeypatch.setattr(sample, "MOST_LEVELS", 3)  # of 4 levels: every second
    fewer = [frame.numpy() for frame in sample.animate(sampler, 6)]
    assert [f.tobytes() for f in fewer] == [at_level[k].tobytes() for k in (1, 3, 4)]
    sample.save_gif(frames, 3, tmp_path / "x.gif")
    assert Image.open(tmp_path / "x.gif").n_frames > 1


def _diverging(sampler):
    return dataclasses.replace(sampler, schedule=sampler.schedule | {"epsilon": 1e38})


def _killed_once(folder):
    """Work whose process is killed with -9 in the middle of job 2, the first time."""

    def make():
        def work(job):
            marker = folder / "killed"
            if job == 2 and not marker.exists():
                marker.write_text("")
                os.kill(os.getpid(), signal.SIGKILL)
            return job * job

        return work

    return make


def test_ray_workers_draw_the_same_shards_and_survive_a_kill(sampler, compose_params, tmp_path):
    blocks = sample.shards(10, 4)
    runtime = compose_params("runtime.workers=2").runtime
    with _ray.cluster(runtime):
        done = dict(_ray.shards(sample.Pool({"ema": sampler}), [("ema", block) for block in blocks], runtime))
        squares = dict(_ray.shards(_killed_once(tmp_path), [0, 1, 2, 3, 4], runtime))
        with pytest.raises(StageError, match=r"^images are not finite"):  # not a traceback of the worker
            list(_ray.shards(sample.Pool({"ema": _diverging(sampler)}), [("ema", (0, 2))], runtime))
    assert {block for _, block in done} == set(blocks)
    drawn = np.concatenate([np.load(sample.shard_path(sampler.folder, block)) for block in blocks])
    assert _close(drawn, sample.Drawer(sampler).draw(torch.arange(10)).numpy())
    for block in blocks:
        path = sample.shard_path(sampler.folder, block)
        assert read_json(path.with_suffix(".json"))["sha256"] == sha256(path)
    assert (tmp_path / "killed").exists()
    assert squares == {0: 0, 1: 1, 2: 4, 3: 9, 4: 16}
