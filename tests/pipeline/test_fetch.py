"""Downloads for a later run; official checkpoints as the product of the stage `train`: drawn from rightly."""

import dataclasses
import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ncsn import images, official, random, samplers
from pipeline import _extractors, _shards, _sources, fetch, prepare, sample, schedule, select, train
from pipeline._sampler import Drawer
from pipeline._stage import StageError
from pipeline._store import read_json, replacing_folder, sha256, write_json
from tests.ncsn.golden import diffusion
from tests.pipeline.server import serving

GOLDEN = Path(__file__).parent.parent / "golden"
V1, V2 = GOLDEN / "ncsn_checkpoint_3.pth", GOLDEN / "ncsnv2_checkpoint_4.pth"
DATA = ("data=patches", "data.resolution=16", "sample.n=3", "noise=ncsn", "noise.steps_per_level=2")
OF_2019 = (*DATA, "model=ncsn", "model.width=8", "model.act=elu")
OF_2020 = (*DATA, "model=ncsnv2", "model.width=8", "model.act=elu")


@pytest.fixture
def ready(compose_params, workdir):
    """Data and schedule of these params, which are returned."""

    def run(*overrides):
        params = compose_params(*overrides)
        prepare.main(params)
        levels = schedule.choose(params.noise, torch.zeros(1, 3, 16, 16))
        with replacing_folder(schedule.OUT) as folder:
            write_json(folder / "schedule.json", levels)
        return params

    return run


def _expected(network, levels, space="pixels"):
    to_space, to_pixels = images.SPACES[space]
    index = torch.arange(3)
    x = samplers.annealed_langevin(
        network,
        to_space(random.start_images(0, index, (3, 16, 16))),
        torch.tensor(levels["sigmas"], dtype=torch.float64),
        epsilon=levels["epsilon"],
        steps_per_level=levels["steps_per_level"],
        denoise=True,
        noise=random.seeded_noise(0, index),
    )
    return images.to_uint8(to_pixels(x)).int()


def _drawn(params, kind="ema"):
    return _drawer(params, kind).draw(torch.arange(3)).int()


def _drawer(params, kind="ema"):
    select.main(params)
    return Drawer.of(sample.make_sampler(params, kind), sample.weights(kind), params.runtime)


def _close(a, b):
    """Equal up to one grey level in a few places: float summation in another memory format, then rounding."""
    return (a - b).abs().max() <= 1 and (a != b).float().mean() < 0.01


@pytest.mark.parametrize(
    ("file", "overrides", "step", "ema_decay"), [(V1, OF_2019, 3, 0.0), (V2, OF_2020, 4, None)], ids=["2019", "2020"]
)
def test_what_is_fetched_draws_what_the_library_draws(ready, file, overrides, step, ema_decay, capsys):
    params = ready(*overrides)
    fetch.main(params, file)
    assert "dvc commit -f train" in capsys.readouterr().out
    levels = schedule.load()
    loaded = official.load(file, sigmas=levels["sigmas"])
    best = loaded.ema_network or loaded.network
    drawn = _drawn(params)
    assert _close(drawn, _expected(best, levels))
    if loaded.ema_network:
        assert not _close(drawn, _expected(loaded.network, levels))
    assert not _close(drawn, _drawn(params, "untrained"))
    model = read_json(train.OUT / "model.json")
    assert (model["step"], model["ema_decay"]) == (step, ema_decay)
    assert model["source"]["sha256"] == sha256(file)
    assert model["parameters"] == sum(p.numel() for p in best.parameters())
    for name, weights in load_file(train.OUT / "ema.safetensors").items():
        assert torch.equal(weights, best.state_dict()[name])


@pytest.mark.parametrize(("flag", "space"), [("rescaled", "centred"), ("logit_transform", "logits")])
def test_a_network_of_other_pixels_draws_in_its_own_space(ready, flag, space):
    params = ready(*OF_2020)
    fetch.main(params, V2, **{flag: True})
    network = official.load(V2, **{flag: True}).ema_network
    assert _close(_drawn(params), _expected(network, schedule.load(), space))
    assert not _close(_drawn(params), _expected(network, schedule.load()))
    frames = _shards.animate(_drawer(params), 3)
    assert _close(frames[-1].int(), _drawn(params))
    assert (frames[-2].int() - frames[-1].int()).abs().float().mean() < 20  # in pixels, too


@pytest.mark.parametrize(
    ("name", "sde", "model"), [("ve_cont_ncsnpp", "ve", "ncsnpp"), ("vp_cont_ddpmpp", "vp", "ddpmpp")]
)
def test_a_checkpoint_of_score_sde_pytorch_is_drawn_from(ready, tmp_path, name, sde, model):
    """By DPM-Solver++, with the averaged weights: what the official network's weights give."""
    stored, _ = diffusion(name)
    params = ready(
        *("data=patches", "data.resolution=16", f"noise={sde}", "noise.L=10", f"model={model}", "sample=dpmpp"),
        *("sample.n=3", "sample.steps=5", "noise.sigma_1=50" if sde == "ve" else "noise.beta_max=20"),
    )
    weights = stored["state_dict"]
    kept = [value for key, value in weights.items() if key not in ("sigmas", "all_modules.0.W")]
    if sde == "vp":  # whose first module is trained
        kept = [value for key, value in weights.items() if key != "sigmas"]
    path = tmp_path / "checkpoint_2.pth"
    ema = {"decay": 0.999, "num_updates": 100_000, "shadow_params": kept}
    torch.save({"optimizer": {}, "model": weights, "ema": ema, "step": 100_000}, path)
    fetch.main(params, path)
    told = read_json(train.OUT / "model.json")
    assert (told["step"], told["network"]["name"], told["space"]) == (100_000, model, "pixels")
    network = official.load_diffusion(path, train.build(told["network"])).ema_network
    drawer, index = _drawer(params), torch.arange(3)
    sigmas = torch.tensor(drawer.sampler.schedule["sigmas"], dtype=torch.float64)
    start = drawer.start(index, random.seeded_noise(0, index))
    expected = samplers.probability_flow(network, start, sigmas, solver="dpmpp")
    assert _close(drawer.draw(index).int(), images.to_uint8(expected).int())


def test_sampling_refuses_an_ncsn_on_another_ladder(ready):
    params = ready(*OF_2019)
    fetch.main(params, V1)
    levels = schedule.choose(dataclasses.replace(params.noise, L=9), torch.zeros(1, 3, 16, 16))
    write_json(schedule.OUT / "schedule.json", levels)
    select.main(params)
    with pytest.raises(StageError) as caught:
        sample.make_sampler(params, "ema")
    message = "out/schedule has 9 levels from 1 to 0.01, but the ncsn in out/train knows none but its own 10 from 1 to"
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("file", "overrides", "message"),
    [
        (
            V2,
            OF_2019,
            "holds a ncsnv2 of width 8 for images with 3 channels, but data.* and model.* make a ncsn of width",
        ),
        (V1, OF_2020, "expected sigmas=..., the 10 noise levels that NCSN was trained with"),
        (V1, (*OF_2019, "noise.L=9"), "got 9 of them (here model.name=ncsn, and out/schedule has 9 noise levels)"),
        (
            V2,
            (*OF_2020, "model.width=16"),
            "ncsnv2 of width 8 for images with 3 channels, but data.* and model.* make a",
        ),
        (V2, (*OF_2020, "noise.L=9"), "was trained with 10 noise levels from 1 to 0.01, but out/schedule has 9 from 1"),
        (V2, (*OF_2020, "noise.L=9"), "noise=manual noise.sigma_1=1 noise.sigma_L=0.01 noise.L=10 noise.epsilon=..."),
        (V2, (*OF_2020, "data=digits", "data.resolution=null"), "make a ncsnv2 of width 8 for images with 1 channels"),
        (GOLDEN / "fid.pt", OF_2020, "expected a list [network, optimizer]"),
        (GOLDEN / "no.pth", OF_2020, "No such file"),
    ],
)
def test_a_refused_file_changes_nothing(ready, file, overrides, message):
    params = ready(*overrides)
    with replacing_folder(train.OUT) as out:
        (out / "old").write_text("as it was")
    with pytest.raises(StageError) as caught:
        fetch.main(params, file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in Path("out").rglob("*") if "train" in path.parts and path.is_file()] == ["old"]
    assert not list(Path("out").glob(".*"))


def test_a_file_that_does_not_tell_its_step_needs_it(ready, workdir):
    params = ready(*OF_2019)
    file = workdir / "checkpoint.pth"
    shutil.copy(V1, file)
    with pytest.raises(StageError, match=r"give them, as --step 200000"):
        fetch.main(params, file)
    assert not train.OUT.exists()
    fetch.main(params, file, step=200_000)
    assert read_json(train.OUT / "model.json")["step"] == 200_000


def test_what_is_missing_is_named(compose_params, ready):
    with pytest.raises(StageError, match=r"manifest.json does not exist: write it with `dvc repro prepare`"):
        fetch.main(compose_params(*OF_2020), V2)
    params = ready(*OF_2020)
    shutil.rmtree(schedule.OUT)
    with pytest.raises(StageError, match=r"schedule.json does not exist: write it with `dvc repro schedule`"):
        fetch.main(params, V2)


# Without a checkpoint: what a later run needs


@pytest.fixture
def published(monkeypatch, workdir):
    """A server with MNIST's four files and the Inception weights, all of them made up; what it is asked for."""
    monkeypatch.delenv("NCSN_DATA", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(workdir / "hub"))
    with serving() as server:
        sources = []
        for each in _sources.PUBLISHED["mnist"]:
            server.files[each.name] = content = each.name.encode()
            digest = f"md5:{hashlib.md5(content).hexdigest()}"
            sources.append(dataclasses.replace(each, digest=digest, urls=(f"{server.url}{each.name}",)))
        monkeypatch.setitem(_sources.PUBLISHED, "mnist", tuple(sources))
        server.files["inception"] = b"weights"
        monkeypatch.setattr(_extractors, "INCEPTION_URL", f"{server.url}inception")
        monkeypatch.setattr(_extractors, "INCEPTION_SHA256", hashlib.sha256(b"weights").hexdigest()[:8])
        yield server


def test_all_that_a_later_run_needs_is_fetched_once(compose_params, published, caplog):
    caplog.set_level("INFO", "pipeline")
    params = compose_params("experiment=ncsn_mnist")
    for _ in range(2):
        fetch.main(params)
        assert len(published.asked) == 5
    assert sorted(path.name for path in Path("data/mnist").iterdir()) == sorted(set(published.files) - {"inception"})
    path = _extractors.inception_path(None)
    assert path.is_relative_to(Path("hub").absolute())
    assert path.read_bytes() == b"weights"
    assert f"inception-v3-compat: in place, {path}" in caplog.text
    assert "data=mnist: in place, data/mnist/train-images-idx3-ubyte.gz, " in caplog.text
    published.files.clear()
    assert _extractors.inception(path).sha256 == sha256(path)  # what evaluation opens without network


def test_inception_is_fetched_only_where_it_is_asked_for(compose_params, published, caplog, workdir):
    caplog.set_level("INFO", "pipeline")
    fetch.main(compose_params("data=digits"))
    assert "data=digits: nothing to download" in caplog.text
    assert not published.asked
    given = compose_params(
        "data=digits", "evaluate.extractor=inception-v3-compat", f"evaluate.inception_weights={workdir}/mine.pth"
    )
    fetch.main(given)
    assert (workdir / "mine.pth").read_bytes() == b"weights"


def test_what_cannot_be_fetched_does_not_keep_the_rest(compose_params, published, workdir):
    del published.files["t10k-images-idx3-ubyte.gz"]
    with pytest.raises(StageError) as caught:
        fetch.main(compose_params("experiment=ncsn_mnist"))
    text = str(caught.value)
    assert text.startswith("t10k-images-idx3-ubyte.gz (1,648,877 bytes, md5:")
    assert "HTTP 404 Not Found" in text
    assert f"{workdir}/data/mnist/t10k-images-idx3-ubyte.gz, or name the folder that holds it" in text
    assert "\n" not in text
    assert _extractors.inception_path(None).is_file()


def test_what_describes_a_checkpoint_needs_one(params):
    for wrong in ({"rescaled": True}, {"logit_transform": True}, {"step": 3}):
        with pytest.raises(StageError, match="expected --checkpoint FILE, too"):
            fetch.main(params, **wrong)
