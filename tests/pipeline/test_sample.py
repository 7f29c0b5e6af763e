"""Samplers and shards: images that depend on their number alone, drawn once, in this process and on Ray workers."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ncsn import images, random
from pipeline import _ray, _shards, prepare, s3, sample, schedule, select, strips, train
from pipeline._pictures import save_gif
from pipeline._sampler import Drawer, Model, Sampler, of_model, of_section, route
from pipeline._shards import Order
from pipeline._stage import StageError
from pipeline._store import read_json, sha256, store, write_json

NETWORK = {"name": "ncsnv2", "channels": 1, "width": 4, "act": "elu"}


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    save_file(train.build(NETWORK).state_dict(), tmp_path / "ema.safetensors")
    return tmp_path / "ema.safetensors"


@pytest.fixture
def sampler(compose_params, weights):
    return Sampler(
        network=NETWORK,
        space="pixels",
        shape=(1, 8, 8),
        weights="ema",
        weights_sha256=sha256(weights),
        step=12,
        method="annealed_langevin",
        schedule=schedule.choose(compose_params("experiment=tiny").noise, torch.rand(20, 1, 8, 8)),
        denoise=True,
        precision="fp32",
        seed=5,
    )


@pytest.fixture
def runtime(compose_params, tmp_path):
    return dataclasses.replace(compose_params().runtime, storage=str(tmp_path / "store"))


@pytest.fixture
def drawer(sampler, weights, runtime):
    return Drawer.of(sampler, weights, runtime)


@pytest.fixture
def order(sampler, weights):
    return Order(sampler, weights, 10, 4)


def _close(a, b):
    """Equal up to one grey level in a few places: float summation in another order, then rounding."""
    difference = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
    return difference.max() <= 1 and (difference > 0).mean() < 0.01


def _write_all(order, drawer, runtime):
    place = store(runtime.storage) / order.sampler.name
    for block in order.blocks:
        _shards.write(place, block, drawer.draw(torch.arange(*block)).numpy(), seconds=1.0, evaluations=8)
    return place


def test_images_do_not_depend_on_the_batch(drawer):
    whole = drawer.draw(torch.arange(12)).numpy()
    parts = torch.cat([drawer.draw(part) for part in torch.arange(12).split(5)]).numpy()
    assert whole.shape == (12, 1, 8, 8)
    assert _close(whole, parts)
    assert len({image.tobytes() for image in whole}) == 12


def test_as_many_go_through_the_network_at_once_as_memory_allows(drawer, sampler, weights, runtime, caplog):
    few = Drawer.of(sampler, weights, dataclasses.replace(runtime, micro_batch=5))
    whole = drawer.draw(torch.arange(12))
    assert _close(few.draw(torch.arange(12)), whole)
    assert few.model.most == 5
    sizes = []

    def draw(index):
        sizes.append(len(index))
        if len(index) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return index

    model = Model(NETWORK, weights.read_bytes(), "fp32", runtime)
    assert model(draw, torch.arange(100, 114), (1, 8, 8)).tolist() == list(range(100, 114))
    assert sizes == [14, 7, 4, 2, 2, 2, 2, 2, 2, 2]
    assert "going on with runtime.micro_batch=2, the same images" in caplog.text

    def never(index):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(StageError, match="out of memory with one image at a time"):
        model(never, torch.arange(3), (1, 8, 8))


def test_bfloat16_draws_about_the_same(drawer, sampler, weights, runtime):
    half = dataclasses.replace(sampler, precision="bf16")
    assert half.name != sampler.name
    a, b = drawer.draw(torch.arange(8)), Drawer.of(half, weights, runtime).draw(torch.arange(8))
    assert 0 < (a.int() - b.int()).abs().float().mean() < sample.TOLERATED["bf16"]


def test_shards_are_fixed_blocks(order):
    assert dataclasses.replace(order, n=40, size=16).blocks == [(0, 16), (16, 32), (32, 40)]
    assert dataclasses.replace(order, n=32, size=16).blocks == [(0, 16), (16, 32)]
    assert dataclasses.replace(order, first=2**40).blocks[0] == (2**40, 2**40 + 4)


def test_whatever_determines_an_image_is_in_the_name(sampler):
    others = [
        {"shape": (1, 16, 16)},
        {"weights_sha256": "1" * 64},
        {"denoise": False},
        {"snr": 0.3},
        {"precision": "bf16"},
        {"seed": 6},
        {"method": "consistent"},
        {"space": "centred"},
        {"schedule": sampler.schedule | {"steps_per_level": 3}},
    ]
    names = {dataclasses.replace(sampler, **other).name for other in [{}, *others]}
    assert len(names) == 1 + len(others)
    assert dataclasses.replace(sampler).name == sampler.name


def test_the_stage_draws_by_its_parameters(compose_params, workdir, monkeypatch):
    hashes = {"ema": "0" * 64, "initial": "1" * 64}
    write_json(train.OUT / "model.json", {"network": NETWORK, "space": "pixels", "step": 12, "sha256": hashes})
    params = compose_params("experiment=tiny", "sample.ranges=3", "sample.denoise=false")
    select.main(params)
    write_json(schedule.OUT / "schedule.json", schedule.choose(params.noise, torch.rand(20, 1, 8, 8)))
    monkeypatch.setattr(sample.prepare, "manifest", lambda: {"shape": [1, 8, 8], "splits": {"test": {"n": 30}}})
    assert sample.weights("ema") == train.OUT / "ema.safetensors"
    orders = sample.make_orders(params)
    assert (orders["ema"].n, orders["untrained"].n) == (120, 30)
    assert (orders["ema"].frames, orders["untrained"].frames) == (25, 0)
    ema, untrained = orders["ema"].sampler, orders["untrained"].sampler
    assert (ema.nfe, ema.step, ema.weights_sha256, ema.denoise) == (8, 12, "0" * 64, False)
    assert (untrained.step, untrained.weights, untrained.weights_sha256) == (0, "initial", "1" * 64)


def test_a_shard_is_drawn_once_and_a_damaged_one_again(order, drawer, runtime, caplog):
    storage = store(runtime.storage)
    assert _shards.missing(order, storage) == order.blocks
    place = _write_all(order, drawer, runtime)
    assert _shards.missing(order, storage) == []
    names = place.names()
    assert names == sorted(f"shard_{a:06d}_{b:06d}.{end}" for a, b in order.blocks for end in ("npy", "json"))
    good = place.read("shard_000004_000008.npy")
    place.write("shard_000004_000008.npy", good[:-1] + bytes([good[-1] ^ 1]))
    place.write("shard_000008_000010.json", b'{"sha')  # half a note
    assert _shards.missing(order, storage) == [(4, 8), (8, 10)]
    assert caplog.text.count("is damaged and drawn again") == 2
    with pytest.raises(StageError, match=r"shard_000004_000008.npy is damaged or gone"):
        _shards.load(order, runtime)
    _write_all(order, drawer, runtime)
    assert place.read("shard_000004_000008.npy") == good
    place.remove("shard_000000_000004.json")  # written last: without it, it was never finished
    assert _shards.missing(order, storage) == [(0, 4)]


def test_images_that_diverge_are_named(sampler, weights, runtime):
    drawer = Drawer.of(_diverging(sampler), weights, runtime)
    with pytest.raises(StageError, match=r"not finite with noise.epsilon=1e\+38 \(Langevin .* 2 sigma_L\^2 = 0.005 on"):
        drawer.draw(torch.arange(2))


def test_the_manifest_describes_the_shards(order, drawer, runtime, tmp_path):
    _write_all(order, drawer, runtime)
    _shards.publish(order, runtime, tmp_path / "out", {"ranges": 1})
    manifest = sample.manifest(tmp_path / "out")
    assert (manifest["n"], manifest["ranges"]) == (10, 1)
    levels = order.sampler.schedule
    assert manifest["nfe"] == levels["L"] * levels["steps_per_level"] + 1
    assert manifest["sampler"]["name"] == "annealed_langevin"
    assert manifest["sampler"]["precision"] == "fp32"
    assert [(s["first"], s["last"]) for s in manifest["shards"]] == [(0, 3), (4, 7), (8, 9)]
    for entry in manifest["shards"]:
        assert sha256(tmp_path / "out" / entry["file"]) == entry["sha256"]
    images = sample.load(tmp_path / "out")
    assert images.shape == (10, 1, 8, 8)
    assert np.array_equal(images, _shards.load(order, runtime))
    assert _close(images, drawer.draw(torch.arange(10)))


def test_the_animation_ends_with_the_samples(drawer, tmp_path, monkeypatch):
    frames = _shards.animate(drawer, 6)
    assert len(frames) == drawer.sampler.schedule["L"] + 1
    assert _close(frames[-1], drawer.draw(torch.arange(6)))
    at_level = [frame.numpy() for frame in frames]
    monkeypatch.setattr(_shards, "MOST_LEVELS", 3)  # of 4 levels: every second
    fewer = [frame.numpy() for frame in _shards.animate(drawer, 6)]
    assert [f.tobytes() for f in fewer] == [at_level[k].tobytes() for k in (1, 3, 4)]
    save_gif(frames, 3, tmp_path / "x.gif")
    assert Image.open(tmp_path / "x.gif").n_frames > 1


def test_chains_start_uniform_or_at_the_noise_level_that_their_sampler_needs(sampler, weights, runtime):
    index, sigma_1 = torch.arange(200), sampler.schedule["sigmas"][0]
    noise = random.seeded_noise(5, index)
    starts = {
        name: Drawer.of(dataclasses.replace(sampler, **own), weights, runtime).start(index, noise)
        for name, own in (("epsilon", {}), ("snr", {"snr": 0.5}), ("consistent", {"method": "consistent"}))
    }
    assert 0 <= starts["epsilon"].min() < starts["epsilon"].max() <= 1
    assert starts["snr"].equal(starts["consistent"])
    assert float((starts["snr"] - starts["epsilon"]).std()) == pytest.approx(sigma_1, rel=0.02)


@pytest.mark.parametrize(
    ("section", "levels", "nfe", "steps"),
    [
        ({"method": "euler"}, 4, 4, 3),
        ({"method": "heun", "steps": 7}, 7, 13, 6),
        ({"method": "dpmpp", "steps": 7}, 7, 7, 6),
        ({"method": "dpmpp_sde", "steps": 7}, 7, 7, 6),
        ({"method": "dpmpp_sde", "steps": 7, "sigma_1": 0.5}, 7, 7, 6),
        ({"method": "predictor_corrector", "steps": 6, "snr": None}, 6, 6, 6),
        ({"method": "predictor_corrector", "steps": 6, "snr": 0.16}, 6, 12, 6),
    ],
)
def test_methods_take_as_many_evaluations_as_they_say(
    compose_params, sampler, weights, runtime, drawer, section, levels, nfe, steps
):
    params = compose_params("experiment=tiny", *(f"sample.{key}={value or 'null'}" for key, value in section.items()))
    own = of_section(params.sample, sampler.schedule)
    predictor = "ancestral" if section["method"] == "predictor_corrector" else None
    other = dataclasses.replace(
        sampler, method=section["method"], schedule=own, snr=section.get("snr"), predictor=predictor
    )
    assert (len(own["sigmas"]), other.nfe, other.steps) == (levels, nfe, steps)
    assert own["sigmas"][0] == own["sigma_1"] == pytest.approx(section.get("sigma_1", sampler.schedule["sigma_1"]))
    assert own["sigmas"][-1] == pytest.approx(sampler.schedule["sigma_L"], rel=1e-3)
    assert other.settings["epsilon"] is None
    made = Drawer.of(other, weights, runtime)
    calls, seen, score = [], [], made.model.score
    made.model.score = lambda x, sigma: calls.append(float(sigma[0])) or score(x, sigma)
    x = made.pixels(torch.arange(6), observe=lambda x, step, sigma: seen.append(step))
    assert (len(calls), seen) == (nfe, list(range(steps)))
    assert torch.allclose(made.pixels(torch.arange(6))[3:], made.pixels(torch.arange(3, 6)), atol=1e-3)
    assert not _close(images.to_uint8(x), drawer.draw(torch.arange(6)))
    made.model.score = lambda x, sigma: torch.full_like(x, torch.nan)
    told = "sample.snr=0.16: lower it" if section.get("snr") else "take more sample.steps"
    with pytest.raises(StageError, match=told):
        made.pixels(torch.arange(2))


def test_evaluations_are_counted_once_however_often_memory_runs_out(sampler, weights, runtime):
    few = Drawer.of(sampler, weights, dataclasses.replace(runtime, micro_batch=5))
    pixels, tried = few.pixels, []

    def scarce(index):
        tried.append(len(index))
        if len(index) > 3 and index[0] > 0:
            raise torch.OutOfMemoryError("out of memory")
        return pixels(index)

    few.pixels = scarce
    few.draw(torch.arange(14))
    assert tried == [5, 5, 3, 3, 3, 3, 2]
    assert few.evaluations == 14 * sampler.nfe


def test_rk45_counts_the_evaluations_of_each_image(compose_params, sampler, weights, runtime):
    """The same in any batch, in the shard's note and as a mean in the manifest; a looser tolerance takes fewer."""
    section = compose_params("experiment=tiny", "sample=ode", "sample.steps=4").sample
    own = dataclasses.replace(
        sampler, method="rk45", schedule=of_section(section, sampler.schedule), tolerance=section.tolerance
    )
    drawer = Drawer.of(own, weights, runtime)
    assert own.nfe is None
    seen = []
    x = drawer.pixels(torch.arange(6), observe=lambda x, step, sigma: seen.append(sigma))
    total = drawer.evaluations
    assert seen == pytest.approx(own.schedule["sigmas"][1:])
    assert 6 * 30 < total < 6 * 500
    parts = [(drawer.draw(part), drawer.evaluations)[1] for part in torch.arange(6).split(1)]
    assert sum(parts) == total
    loose = Drawer.of(dataclasses.replace(own, tolerance=1e-3), weights, runtime)
    near = loose.pixels(torch.arange(6))
    assert loose.evaluations < total
    assert float((near - x).abs().max()) < 0.05
    drawer.model.score = lambda x, sigma: torch.full_like(x, torch.nan)
    with pytest.raises(StageError, match=r"values that are not finite at .* raise sample.tolerance=1e-05"):
        drawer.pixels(torch.arange(2))


def test_a_flow_between_two_noises_leads_from_one_image_to_another(sampler, weights, runtime):
    """The start is all the noise there is."""
    flow = dataclasses.replace(sampler, method="dpmpp", schedule=route(sampler.schedule, "dpmpp", 5))
    made = Drawer.of(flow, weights, runtime)
    row = strips.between(made, 1, 5)
    ends = made.pixels(torch.arange(1)).clamp(0, 1)
    assert torch.allclose(row[:1], ends, atol=1e-4)
    assert (row[1:] - row[:-1]).flatten(1).norm(dim=1).min() > 1e-3


def test_a_network_with_levels_of_its_own_is_solved_at_these_alone(compose_params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = compose_params("experiment=tiny", "model=ncsn", "sample=dpmpp")
    levels = schedule.choose(params.noise, torch.rand(20, 1, 8, 8))
    schedule.OUT.mkdir(parents=True)
    prepare.OUT.mkdir(parents=True)
    write_json(schedule.OUT / "schedule.json", levels)
    write_json(prepare.OUT / "manifest.json", {"shape": [1, 8, 8]})
    model = {"network": train.describe(params.model, 1, levels), "space": "pixels"}
    told = r"sample.steps=18 has 18 levels .* knows none but its own 4 .* set sample.steps=null"
    with pytest.raises(StageError, match=told):
        of_model(params, model, "ema", "", 1, 0)
    own = compose_params("experiment=tiny", "model=ncsn", "sample=dpmpp", "sample.steps=null")
    assert of_model(own, model, "ema", "", 1, 0).schedule["sigmas"] == levels["sigmas"]
    between = compose_params("experiment=tiny", "model=ncsn", "sample=ode", "sample.steps=null")
    with pytest.raises(StageError, match=r"sample.method=rk45 asks for any level, .* draw by sample=heun with"):
        of_model(between, model, "ema", "", 1, 0)


def test_the_consistent_method_draws_other_images_in_fewer_evaluations(sampler, weights, runtime, drawer):
    share = {"epsilon": 0.8 * sampler.schedule["sigmas"][-1] ** 2, "steps_per_level": 3}
    consistent = dataclasses.replace(sampler, method="consistent", schedule=sampler.schedule | share)
    assert consistent.nfe == 3 * 3 + 1
    other = Drawer.of(consistent, weights, runtime)
    calls = []
    score = other.model.score
    other.model.score = lambda x, sigma: calls.append(float(sigma[0])) or score(x, sigma)
    x = other.draw(torch.arange(6))
    assert len(calls) == consistent.nfe
    assert calls[0] == pytest.approx(sampler.schedule["sigmas"][0])
    assert not _close(x, drawer.draw(torch.arange(6)))
    frames = _shards.animate(other, 6)
    assert len(frames) == 3 + 1
    assert _close(frames[-1], x)
    wild = dataclasses.replace(consistent, schedule=sampler.schedule | {"epsilon": 1e-9})
    with pytest.raises(StageError, match=r"sample.method=consistent: expected epsilon from .*: set noise.epsilon"):
        Drawer.of(wild, weights, runtime).draw(torch.arange(2))


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


@pytest.mark.usefixtures("one_cluster")
def test_ray_workers_draw_the_same_shards_and_survive_a_kill(order, drawer, runtime, on_s3, tmp_path, caplog):
    caplog.set_level("INFO", "pipeline")
    initial = dataclasses.replace(order, n=6, sampler=dataclasses.replace(order.sampler, seed=9))
    orders = {"ema": dataclasses.replace(order, frames=3), "other": initial}
    remote = dataclasses.replace(runtime, storage=s3.STORAGE)
    with _ray.cluster(runtime):
        drawn = _shards.draw(orders, remote)
        assert drawn.pace > 0
        seconds = [_shards.seconds(each, remote) for each in orders.values()]
        assert min(seconds) > 0
        place = store(s3.STORAGE) / order.sampler.name
        place.write("shard_000004_000008.npy", b"not an array")
        caplog.clear()
        _shards.draw(orders, remote)
        again = [_shards.seconds(each, remote) for each in orders.values()]
        assert [a == b for a, b in zip(seconds, again, strict=True)] == [False, True]  # of which one shard is new
        assert "ema: 10 images, 9 NFE each, 6 there already" in caplog.text
        assert "other: 6 images, 9 NFE each, 6 there already" in caplog.text
        squares = dict(_ray.shards(_killed_once(tmp_path), [0, 1, 2, 3, 4], runtime))
        with pytest.raises(StageError, match=r"^images are not finite"):  # not a traceback of the worker
            _shards.draw({"ema": dataclasses.replace(order, sampler=_diverging(order.sampler))}, runtime)
        with pytest.raises(StageError, match=r"runtime.actors=99: this machine has \d+ cores, expected at most"):
            list(_ray.shards(_killed_once(tmp_path), [0], dataclasses.replace(runtime, actors=99)))
        frail = dataclasses.replace(runtime, max_failures=0)
        (tmp_path / "killed").unlink()
        with pytest.raises(StageError, match=r"a worker died more than runtime.max_failures=0 times"):
            list(_ray.shards(_killed_once(tmp_path), [2], frail))
    assert _close(_shards.load(order, remote), drawer.draw(torch.arange(10)))
    assert not _close(_shards.load(order, remote)[:6], _shards.load(initial, remote))
    assert _close(drawn.frames["ema"][-1], drawer.draw(torch.arange(3)))
    assert squares == {0: 0, 1: 1, 2: 4, 3: 9, 4: 16}


def test_what_is_drawn_again_is_compared_with_what_is_there(order, drawer, runtime, params, workdir, caplog):
    caplog.set_level("INFO", "pipeline")
    params = dataclasses.replace(params, runtime=runtime)
    _write_all(order, drawer, runtime)
    (workdir / "samples").mkdir()
    _shards.publish(order, runtime, workdir / "samples" / "ema", {"ranges": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "OUT", workdir / "samples")
        sample.check_again({"ema": order}, params, 99)
        assert "ema: 10 of 10 images drawn again, " in caplog.text
        other = dataclasses.replace(order, sampler=dataclasses.replace(order.sampler, seed=6))
        with pytest.raises(StageError, match=r"was drawn with seed=5, not 6"):
            sample.check_again({"ema": other}, params, 3)
        path = workdir / "samples" / "ema" / "shard_000004_000008.npy"
        swapped = np.load(path)[::-1]
        np.save(path, swapped)
        with pytest.raises(StageError, match=r"shard_000004_000008.npy is damaged"):
            sample.check_again({"ema": order}, params, 3)
        manifest = read_json(path.with_name("manifest.json"))
        manifest["shards"][1]["sha256"] = sha256(path)
        write_json(path.with_name("manifest.json"), manifest)
        with pytest.raises(StageError, match=r"image [4-7] drawn again is another one: its pixels differ by"):
            sample.check_again({"ema": order}, params, 10)
