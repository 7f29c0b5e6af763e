"""What the ablations measure, tabulate and draw, but for Ray."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pipeline import _params, _ray, _sampler, _stage, _trial, ablation, prepare, schedule, techniques
from pipeline._store import read_json, write_json
from pipeline.compose import compose

SIGMAS = [2.0, 0.5, 0.1]


def _sampler_of(snr=None, epsilon=1e-3):
    levels = {"spacing": "geometric", "sigmas": SIGMAS, "steps_per_level": 4, "epsilon": epsilon, "L": 3}
    network = {"name": "unet"}
    values = ["pixels", (1, 8, 8), "ema", "0" * 64, 9, "annealed_langevin", levels, True, "fp32", 0]
    return _sampler.Sampler(network, *values, snr=snr)


def _drawer(score, **settings):
    model = SimpleNamespace(score=score, device=torch.device("cpu"))
    return _sampler.Drawer(_sampler_of(**settings), model)


def test_the_ratio_of_an_update_is_the_one_its_rule_holds():
    drawer = _drawer(lambda x, sigma: (0.5 - x) / (sigma.view(-1, 1, 1, 1) ** 2 + 0.04), snr=0.3)
    assert ablation.ratios(drawer) == pytest.approx([0.3] * 3, rel=1e-5)
    # A score as long as z / sigma is gives sqrt(epsilon / 2) / sigma_L, up to the length of z.
    drawer = _drawer(lambda x, sigma: torch.ones_like(x) / sigma.view(-1, 1, 1, 1), epsilon=2 * (0.3 * 0.1) ** 2)
    found = ablation.ratios(drawer)
    assert found == pytest.approx([0.3] * 3, rel=0.03)
    assert found != pytest.approx([0.3] * 3, rel=1e-5)


def test_the_loss_of_a_level_is_one_for_no_score_and_less_for_a_good_one(monkeypatch):
    x = np.full((200, 1, 8, 8), 128, np.uint8)
    monkeypatch.setattr(prepare, "load", lambda split: (x, None))
    nothing = ablation.level_losses(_drawer(lambda x, sigma: torch.zeros_like(x)), seed=0)
    assert nothing == pytest.approx([1, 1, 1], rel=0.05)
    exact = _drawer(lambda x, sigma: (128 / 255 - x) / sigma.view(-1, 1, 1, 1) ** 2)
    assert ablation.level_losses(exact, seed=0) == pytest.approx([0, 0, 0], abs=1e-8)


def _trials(folder):
    """Two seeds of each spacing, two step sizes; with seed 1 the larger one diverges under the linear levels."""
    trials = []
    for spacing, fids in (("geometric", [5.0, 4.0]), ("linear", [30.0, 20.0])):
        for seed in (0, 1):
            name = f"{spacing}_{seed}"
            (folder / name).mkdir()
            np.save(folder / name / "images_0.npy", np.zeros((36, 1, 8, 8), np.uint8))
            rows = []
            for by_ratio in (False, True) if spacing == "geometric" else (False,):
                for r, fid in zip((0.2, 0.5), fids, strict=True):
                    np.save(folder / name / f"images_{len(rows)}.npy", np.zeros((36, 1, 8, 8), np.uint8))
                    failed = spacing == "linear" and (seed, r) == (1, 0.5)
                    way = {"epsilon": 2 * (r * 0.1) ** 2, "snr": r if by_ratio else None, "nfe": 61}
                    rows.append(way | {"fid": None if failed else fid + seed - by_ratio, "ratios": [r, r, r]})
            setting = {"spacing": spacing, "sigma_1": 2.0, "sigma_L": 0.1, "L": 3}
            told = {"setting": setting, "rows": rows, "losses": [0.1, 0.2, 0.3], "fid": 1.0, "extractor": {"name": "c"}}
            write_json(folder / name / _trial.DONE, told | {"metric": "fid", "n": 300})
            trials.append(_ray.Trial(name, {"noise.spacing": spacing, "train.seed": seed}, {}, None))
    return trials


def test_each_schedule_has_its_best_step_size_over_the_seeds(tmp_path):
    trials = ablation.finished(_trials(tmp_path), tmp_path)
    rows = [ablation.row(name, trials) for name in ablation.ROWS]
    geometric, linear, by_ratio = rows
    assert (geometric["r"], geometric["fid"], geometric["mean"]) == (0.5, [4.0, 5.0], 4.5)
    assert geometric["std"] == pytest.approx(np.std([4, 5], ddof=1))
    assert geometric["epsilon"] == pytest.approx(2 * 0.05**2)
    assert (linear["r"], linear["fid"]) == (0.2, [30.0, 31.0])  # 0.5 had a better seed 0, and images of it alone
    assert (by_ratio["r"], by_ratio["fid"], by_ratio["epsilon"]) == (0.5, [3.0, 4.0], None)
    assert linear["sigmas"] == pytest.approx([2.0, 1.05, 0.1])
    assert ablation.table(rows).splitlines()[2].split()[-4:] == ["30.5", "+-", "0.71", "477.47"]
    assert "linear: 6.78 times the FID of geometric, worse with 2 of 2 seeds (users: 2.07 times)" in ablation.verdict(
        rows
    )
    base = _params.parse(compose(["experiment=tiny"]))
    out = tmp_path / "out"
    out.mkdir()
    ablation.publish(rows, trials, base, out)
    assert read_json(out / "ablation.json")["rows"][1]["users"] == 477.47
    for name in ("curves", "grids"):
        assert Image.open(out / f"{name}.png").width > 800


def test_a_trial_that_failed_is_named(tmp_path):
    failed = _ray.Trial("x", {"train.seed": 3}, {}, "loss not finite")
    with pytest.raises(_stage.StageError, match=r"trial x with .*'train.seed': 3.* failed: loss not finite"):
        ablation.finished([failed], tmp_path)


def test_the_trials_have_levels_that_need_nothing_computed(monkeypatch):
    x = np.random.default_rng(0).integers(0, 255, (20, 1, 8, 8), np.uint8)
    monkeypatch.setattr(prepare, "load", lambda split: (x, None))
    params = _params.parse(compose([]))
    base = ablation.of_trial(params)
    assert (base.model.name, base.train.steps) == ("unet", params.ablation.steps)
    for spacing in ("geometric", "linear"):
        noise = _params.parse(_params.as_dict(base) | {"noise": _params.as_dict(base)["noise"] | {"spacing": spacing}})
        levels = schedule.choose(noise.noise, torch.from_numpy(x))
        assert set(levels["how"].values()) == {"given"}
        assert len(levels["sigmas"]) == base.noise.L


def test_the_techniques_are_ranked_and_failures_told(tmp_path):
    trials, fid = [], 50.0
    for variant in techniques.NETWORKS:
        for seed in (0, 1):
            if (variant, seed) == ("3", 1):
                trials.append(_ray.Trial("bad", {"variant": variant, "train.seed": 1}, {}, "loss not finite"))
                continue
            name = f"{variant}_{seed}"
            (tmp_path / name).mkdir()
            rows = []
            for weights in ("last", "ema"):
                fid -= 1
                np.save(tmp_path / name / f"images_{weights}.npy", np.zeros((25, 1, 8, 8), np.uint8))
                rows.append({"weights": weights, "fid": fid, "reason": None, "nfe": 1001})
            write_json(tmp_path / name / _trial.DONE, {"rows": rows})
            trials.append(_ray.Trial(name, {"variant": variant, "train.seed": seed}, {}, None))
    rows = techniques.table_of(trials, tmp_path)
    assert [each["name"] for each in rows][:2] == ["none", "5"]
    assert rows[-1]["name"] == "all"
    assert {each["name"] for each in rows} == {*techniques.NETWORKS, *techniques.AVERAGED.values()}
    (third,) = (each for each in rows if each["name"] == "3")
    assert (third["seeds"], third["reasons"], third["std"]) == ([0], ["loss not finite"], None)
    assert "failed: loss not finite" in techniques.table(rows)
    out = tmp_path / "out"
    out.mkdir()
    extractor = SimpleNamespace(name="digits-classifier")
    techniques.publish(rows, _params.parse(compose(["experiment=tiny"])), extractor, out)
    assert Image.open(out / "fid.png").width > 700
    assert Image.open(out / "grids.png").width > 800


def test_the_old_schedule_is_that_of_conf():
    told = yaml.safe_load((_ray.ROOT / "conf/noise/ncsn.yaml").read_text())
    assert {key: float(told[key]) for key in techniques.OF_2019 if key != "spacing"} == {
        key: value for key, value in techniques.OF_2019.items() if key != "spacing"
    }


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("ablation.seeds=[]", "ablation.seeds=[]: expected at least one value, and each once"),
        ("ablation.seeds=[1,1]", "ablation.seeds=[1, 1]: expected at least one value, and each once"),
        ("ablation.snr=[0.5,1.5]", "ablation.snr=(0.5, 1.5): expected a list of numbers > 0 and < 1"),
        ("ablation.model.name=ncsn", "ablation.model.multipliers=(1, 2, 2): expected null but for ablation.model.name"),
        ("ablation.model.width=0", "ablation.model.width=0: expected a whole number >= 2"),
    ],
)
def test_an_ablation_that_cannot_be_is_refused(override, told):
    with pytest.raises(_params.ParamsError) as error:
        _params.parse(compose([override]))
    assert str(error.value).startswith(told)
