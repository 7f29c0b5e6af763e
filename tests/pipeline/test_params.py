"""params.yaml: the committed file is the composition, and bad values end in one line that names them."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ncsn.noise import geometric_sigmas, suggest_epsilon
from pipeline import _params, _stage
from pipeline.compose import CONF, compose

ROOT = Path(__file__).parent.parent.parent


def test_the_committed_file_is_the_composition():
    assert _params.load(ROOT / "params.yaml") == _params.parse(compose([]))


OF_SDES = {  # arXiv:2011.13456 and its code; its loss under VP and sub-VP is a mean over 3,072 values, without a half
    # sde, model, blocks, steps, ema_decay, clip_norm, sampler
    "ve_cifar10": ("ve", "ncsnpp", 4, 1_300_000, 0.999, 1, "predictor_corrector"),
    "vp_cifar10": ("vp", "ddpmpp", 4, 1_300_000, 0.9999, 3072 / 2, "predictor_corrector"),
    "subvp_cifar10": ("subvp", "ddpmpp", 4, 1_300_000, 0.9999, 3072 / 2, "predictor_corrector"),
    "ve_deep_cifar10": ("ve", "ncsnpp", 8, 950_000, 0.999, 1, "predictor_corrector"),
    "vp_deep_cifar10": ("vp", "ddpmpp", 8, 950_000, 0.9999, 3072 / 2, "predictor_corrector"),
    "subvp_deep_cifar10": ("subvp", "ddpmpp", 8, 950_000, 0.9999, 3072 / 2, "predictor_corrector"),
    "ddpm_cifar10": ("vp", "ddpm", 2, 1_300_000, 0.9999, 3072 / 2, "rk45"),
}


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment_composes(option):
    params = _params.parse(compose([f"experiment={option}"]))
    if option in OF_SDES:
        model, train = params.model, params.train
        found = params.noise.sde, model.name, model.blocks, train.steps, train.ema_decay, train.clip_norm
        assert (*found, params.sample.method) == OF_SDES[option]
        assert params.data.name == "cifar10"
        assert (model.width, model.multipliers, model.attention, model.dropout) == (128, (1, 2, 2, 2), (1,), 0.1)
        assert (train.learning_rate, train.batch_size, train.warmup, train.beta_2) == (2e-4, 128, 5000, 0.999)
    elif option != "tiny":  # published settings
        assert params.data.name.removeprefix("lsun_") == option.split("_", 1)[1]
        assert params.data.root is None
        assert params.model.act == "elu"
        train = params.train
        assert (train.decay, train.warmup, train.level_power, train.beta_2) == ("constant", 0, 1, 0.999)
        assert params.sample.denoise == params.model.name.startswith("ncsnv2")


PUBLISHED = {  # arXiv:1907.05600 and arXiv:2006.09011 with their code; ncsn_* from 64 on are the latter's
    # side, sigma_1, L, T, epsilon, batch, steps, lr, adam_eps, ema_decay, model, width, dequantise, flip
    "ncsn_mnist": (28, 1, 10, 100, 2e-5, 128, 200_000, 1e-3, 1e-8, 0, "ncsn", 64, True, False),
    "ncsn_cifar10": (32, 1, 10, 100, 2e-5, 128, 200_000, 1e-3, 1e-8, 0, "ncsn", 128, True, True),
    "ncsn_celeba32": (32, 1, 10, 100, 2e-5, 128, 200_000, 1e-3, 1e-8, 0, "ncsn", 128, True, True),
    "ncsn_celeba64": (64, 1, 10, 100, 2e-5, 128, 210_000, 1e-3, 1e-8, 0, "ncsn", 128, True, True),
    "ncsn_church96": (96, 1, 10, 100, 2e-5, 128, 200_000, 1e-3, 1e-8, 0, "ncsn_deeper", 128, True, True),
    "ncsn_bedroom128": (128, 1, 10, 100, 2e-5, 64, 150_000, 1e-3, 1e-8, 0, "ncsn_deeper", 128, True, True),
    "ncsnv2_cifar10": (32, 50, 232, 5, 6.2e-6, 128, 300_000, 1e-4, 1e-8, 0.999, "ncsnv2", 128, False, True),
    "ncsnv2_celeba64": (64, 90, 500, 5, 3.3e-6, 128, 210_000, 1e-4, 1e-8, 0.999, "ncsnv2", 128, False, True),
    "ncsnv2_church96": (96, 140, 788, 4, 4.9e-6, 128, 200_000, 1e-4, 1e-8, 0.999, "ncsnv2_deeper", 128, False, True),
    "ncsnv2_tower128": (128, 190, 1086, 3, 1.8e-6, 128, 150_000, 1e-4, 1e-8, 0.999, "ncsnv2_deeper", 128, False, True),
    "ncsnv2_ffhq256": (256, 348, 2311, 3, 9e-7, 32, 80_000, 1e-4, 1e-3, 0.999, "ncsnv2_deepest", 128, False, True),
}
PUBLISHED["ncsnv2_bedroom128"] = PUBLISHED["ncsnv2_tower128"]


@pytest.mark.parametrize("option", sorted(path.stem for path in (CONF / "experiment").glob("ncsn*.yaml")))
def test_experiments_have_the_published_settings(option):
    p = _params.parse(compose([f"experiment={option}"]))
    noise, train = p.noise, p.train
    found = (
        p.data.resolution,
        noise.sigma_1,
        noise.L,
        noise.steps_per_level,
        noise.epsilon,
        train.batch_size,
        train.steps,
    )
    found += (train.learning_rate, train.adam_eps, train.ema_decay, p.model.name, p.model.width, train.dequantise)
    assert (*found, p.data.flip) == PUBLISHED[option]
    assert (noise.sigma_L, noise.spacing) == (0.01, "geometric")
    assert p.data.crop == (140 if "celeba" in option else None)
    assert p.data.channels == (1 if option == "ncsn_mnist" else 3)
    assert not (train.ema_decay and train.ema_warmup)


@pytest.mark.parametrize(
    ("option", "published", "of_technique_4"),
    [
        ("ncsnv2_cifar10", 6.2e-6, 6.18e-6),
        ("ncsnv2_celeba64", 3.3e-6, 3.34e-6),
        ("ncsnv2_church96", 4.9e-6, 2.31e-6),  # not reproduced, as the file says
        ("ncsnv2_bedroom128", 1.8e-6, 1.77e-6),
        ("ncsnv2_tower128", 1.8e-6, 1.77e-6),
        ("ncsnv2_ffhq256", 9e-7, 8.93e-7),
    ],
)
def test_published_schedules_and_what_technique_4_makes_of_them(option, published, of_technique_4):
    given = _params.parse(compose([f"experiment={option}"])).noise
    found = suggest_epsilon(geometric_sigmas(given.sigma_1, given.sigma_L, given.L), given.steps_per_level)
    assert found == pytest.approx(of_technique_4, rel=0.005)
    assert given.epsilon == published


UNDER = {"ddpm": ["noise=vp"], "ddpmpp": ["noise=subvp"]}


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"data={path.stem}", "data.root=x", "data.resolution=32"] for path in (CONF / "data").glob("*.yaml")),
        ["noise=ncsn"],
        *([f"model={path.stem}", *UNDER.get(path.stem, ())] for path in (CONF / "model").glob("*.yaml")),
        *([f"sample={path.stem}"] for path in (CONF / "sample").glob("*.yaml")),
        *([f"noise={sde}", "sample=dpmpp_sde"] for sde in ("ve", "vp", "subvp")),
        *([f"loss={path.stem}"] for path in (CONF / "loss").glob("*.yaml")),
    ],
)
def test_every_group_option_composes(overrides):
    _params.parse(compose(overrides))


def test_an_override_reaches_its_key_with_its_type():
    params = _params.parse(compose(["noise.L=20", "train.learning_rate=1", "data=fashion_mnist"]))
    assert params.noise.L == 20
    assert params.train.learning_rate == 1.0
    assert isinstance(params.train.learning_rate, float)
    assert params.data.name == "fashion_mnist"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batch_size=abc", "train.batch_size='abc': expected a whole number >= 1"),
        ("train.batch_size=0", "train.batch_size=0: expected a whole number >= 1"),
        ("train.batch_size=1.5", "train.batch_size=1.5: expected a whole number >= 1"),
        ("train.batch_size=true", "train.batch_size=True: expected a whole number >= 1"),
        ("train.batch_size=null", "train.batch_size=None: expected a whole number >= 1"),
        ("noise.L=1", "noise.L=1: expected a whole number >= 2 or null"),
        ("noise.sigma_L=-1", "noise.sigma_L=-1.0: expected a number > 0"),
        ("noise.sigma_1=0.001", "noise.sigma_1=0.001: expected more than noise.sigma_L=0.05"),
        ("noise.epsilon=0.01", "noise.epsilon=0.01: expected less than 2 noise.sigma_L^2 = 0.005, from which on"),
        ("train.ema_decay=1", "train.ema_decay=1.0: expected a number from 0 to less than 1"),
        ("train.seed=-1", "train.seed=-1: expected a whole number from 0 to 2^32 - 1"),
        ("data.flip=1", "data.flip=1: expected true or false"),
        ("data.name=cifar", "data.name='cifar': expected one of digits, mnist, fashion_mnist, cifar10, "),
        ("data.crop=140", "data.crop=140: expected null with data=digits"),
        (
            "model.name=unet",
            "model.multipliers=None: expected null but for model.name=unet, ncsnpp, ddpmpp",
        ),
        ("sample.snr=0", "sample.snr=0.0: expected a number > 0 or null"),
        (
            "sample.steps=9",
            "sample.steps=9: expected null with sample.method=annealed_langevin, whose steps",
        ),
        (
            "sample.method=predictor_corrector",
            "sample.steps=None: expected a whole number >= 2 with sample.method=",
        ),
        ("sample.sigma_1=2", "sample.sigma_1=2: expected null with sample.method=annealed_langevin and sample.steps"),
        ("tune.search=bayes", "tune.search='bayes': expected one of grid, random, tpe"),
        ("tune.sigma_1=[1,-2]", "tune.sigma_1=(1, -2): expected a list of numbers > 0"),
        ("tune.sigma_1=[0.1,10]", "tune.sigma_1=[0.1, 10]: expected more than the greatest sigma_L, 0.1"),
        ("tune.L=[1,20]", "tune.L=(1, 20): expected a list of whole numbers >= 2"),
        ("tune.L=[8.5,20]", "tune.L=(8.5, 20): expected a list of whole numbers >= 2"),
        (
            "tune.epsilon=[0.5,2]",
            "tune.epsilon=(0.5, 2): expected a list of numbers > 0 and < 2, in units of",
        ),
        ("tune.steps_per_level=[]", "tune.steps_per_level=[]: expected at least one whole number >= 1"),
        ("tune.denoise=[yes,no,1]", "tune.denoise="),
        ("model.multipliers=[1,2]", "model.multipliers=(1, 2): expected null but for model.name=unet"),
        ("model.multipliers=[1,0]", "model.multipliers=(1, 0): expected whole numbers >= 1, as in [1, 2, 2] or null"),
        (
            "model=resscore",
            "Could not find 'model/resscore' Available options in 'model': ddpm ddpmpp ncsn",
        ),
        ("loss.projections=0", "loss.projections=0: expected a whole number >= 1"),
        ("loss.name=sm", "loss.name='sm': expected one of dsm, ssm, ssm_vr"),
        ("data.channels=2", "data.channels=2: expected 1 or 3 or null"),
        ("runtime.workers=7", "runtime.workers=7: expected a divisor of train.batch_size=64"),
        ("runtime.gpus_per_worker=2", "runtime.gpus_per_worker=2.0: expected a number > 0, below 1 where several"),
        ("train.save_every=30", "train.save_every=30: expected a multiple of train.log_every=20"),
        ("train.batchsize=3", "train.batchsize=3: unknown key, allowed are steps, batch_size, "),
        ("trian.steps=3", "trian.steps=3: unknown key, allowed are data, model, "),
        ("+train.batchsize=3", "did you mean train.batch_size?"),
        ("~train.seed", "train.seed is missing: write params.yaml anew with `python -m pipeline.compose`"),
        ("noise=manual", "noise.sigma_1 is not given: expected a number > 0, for instance -S noise.sigma_1=..."),
        ("+extra=1", "extra=1: unknown key, allowed are data, model, "),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(override, message):
    with pytest.raises(_params.ParamsError) as caught:
        _params.parse(compose([override]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=cifar", "Could not find 'data/cifar' Available options in 'data': celeba32 celeba64 cifar10 digits"),
        ("nonsense", "nonsense"),
        ("train=null", "must be a string or a list"),
    ],
)
def test_overrides_that_hydra_refuses_end_in_one_line(override, message):
    with pytest.raises(_params.ParamsError) as caught:
        compose([override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(_params.ParamsError, match=r"missing.yaml does not exist: write it with"):
        _params.load(tmp_path / "missing.yaml")
    (tmp_path / "broken.yaml").write_text("data: [1, 2")
    with pytest.raises(_params.ParamsError, match=r"broken.yaml cannot be read"):
        _params.load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(_params.ParamsError, match=r"expected the keys data, model"):
        _params.load(tmp_path / "list.yaml")


def test_a_stage_ends_in_that_one_line_and_a_status(tmp_path):
    text = (ROOT / "params.yaml").read_text().replace("batch_size: 64", "batch_size: abc", 1)
    (tmp_path / "params.yaml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.schedule", "--params", str(tmp_path / "params.yaml")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: features.batch_size='abc': expected a whole number >= 2"]


def test_ctrl_c_ends_a_stage_in_one_line_and_a_status(tmp_path, monkeypatch, caplog):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.setattr(sys, "argv", ["stage", "--params", str(tmp_path / "params.yaml")])
    with pytest.raises(SystemExit) as ended:
        _stage.run("stage", None, lambda params: signal.raise_signal(signal.SIGINT))
    assert ended.value.code == 130
    assert [record.message for record in caplog.records] == [
        "stopped by Ctrl-C: what is saved stays, and the same command goes on from there"
    ]


def test_compose_writes_the_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.compose", "noise.L=20"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert _params.load(tmp_path / "params.yaml").noise.L == 20


@pytest.mark.parametrize("path", sorted((CONF / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_data_set_has_the_name_of_its_option_and_says_if_it_is_cropped(path):
    data = _params.parse(compose([f"data={path.stem}", "data.root=x", "data.resolution=32"])).data
    assert data.name == path.stem
    overrides = [f"data={path.stem}", "data.root=x", "data.resolution=32", "data.crop=30"]
    if path.stem in ("celeba32", "celeba64", "image_folder"):
        assert _params.parse(compose(overrides)).data.crop == 30
    else:
        with pytest.raises(_params.ParamsError, match=f"data.crop=30: expected null with data={path.stem}"):
            _params.parse(compose(overrides))


def test_only_trainings_of_one_worker_share_a_gpu():
    assert _params.parse(compose(["runtime.gpus_per_worker=0.25"])).runtime.gpus_per_worker == 0.25
    with pytest.raises(_params.ParamsError, match=r"gpus_per_worker=0.25: expected 1 with runtime.workers=\(1, 4\)"):
        _params.parse(compose(["runtime.gpus_per_worker=0.25", "runtime.workers=[1,4]"]))
