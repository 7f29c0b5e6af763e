"""The sweep but for Ray: what a trial is, how it is run, told and drawn."""

import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline import _params, _ray, _trial, tune
from pipeline import compose as compose_module
from pipeline._store import read_json, write_json
from pipeline.compose import compose


def _plan(tmp_path, code):
    root = tmp_path / "root"
    (root / "out" / "data").mkdir(parents=True, exist_ok=True)
    params = {"noise": {"sigma_1": None, "L": 4}, "train": {"steps": 12}}
    program = (sys.executable, "-c", code)
    return _trial.Plan(
        str(root), str(tmp_path / "sweep"), ("out/data",), program, {"PYTHONPATH": str(_ray.ROOT)}, params
    )


def test_a_trial_has_its_setting_and_what_its_program_tells_is_reported(tmp_path):
    code = "from pipeline import _trial; _trial.tell(step=1, fid=9.5); _trial.tell(step=2, fid=3.0)"
    told = []
    _trial.run(_plan(tmp_path, code), "a", {"noise.sigma_1": 2.5}, told.append)
    assert told == [{"step": 1, "fid": 9.5}, {"step": 2, "fid": 3.0}]
    folder = tmp_path / "sweep" / "a"
    assert _params.plain(_params.OmegaConf.load(folder / "params.yaml")) == {
        "noise": {"sigma_1": 2.5, "L": 4},
        "train": {"steps": 12},
    }
    assert (folder / "out" / "data").resolve() == tmp_path / "root" / "out" / "data"
    _trial.run(_plan(tmp_path, code), "a", {"noise.sigma_1": 2.5}, told.append)  # once more, after a crash
    assert len(told) == 4


def test_a_failing_program_gives_its_last_line_as_the_reason(tmp_path):
    code = "import sys; print('a line'); sys.exit('error: sigma_L=3: expected less')"
    with pytest.raises(_trial.TrialError, match=r"^sigma_L=3: expected less$"):
        _trial.run(_plan(tmp_path, code), "b", {}, print)
    assert (tmp_path / "sweep" / "b" / _trial.FAILED).read_text() == "sigma_L=3: expected less\n"
    with pytest.raises(_trial.TrialError, match="exit status 3"):
        _trial.run(_plan(tmp_path, "import sys; sys.exit(3)"), "c", {}, print)


def test_a_program_ends_with_its_trial(tmp_path):
    code = "import os, time; from pipeline import _trial; _trial.tell(pid=os.getpid()); time.sleep(600)"
    told = []

    def stop(values):
        told.append(values["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _trial.run(_plan(tmp_path, code), "d", {}, stop)
    assert not Path(f"/proc/{told[0]}").exists()


def test_trials_are_counted_and_judged_on_the_way():
    params = _params.parse(compose(["tune=grid"]))
    assert tune.networks(params.tune, {"sigma_1": (1.0, 2.0, 3.0), "L": (10, 20)}) == 6
    params = _params.parse(compose(["tune=asha", "tune.steps=650"]))
    assert tune.networks(params.tune, {"sigma_1": (1.0, 2.0)}) == params.tune.trials
    trial = tune.of_trial(params)
    assert tune.rungs(trial) == [160, 320]
    assert (trial.train.steps, trial.train.save_every) == (650, 660)
    assert Path(trial.runtime.storage).is_absolute()
    assert trial.runtime.keep >= 4
    assert tune.rungs(tune.of_trial(_params.parse(compose([])))) == []


def _way(T, fid, **other):
    way = {"method": "annealed_langevin", "T": T, "epsilon": 1e-3, "snr": None, "denoise": True, "nfe": 10 * T + 1}
    return way | {"seconds": 0.1, "fid": fid, "reason": None if fid else "images are not finite"} | other


def _trials(folder):
    """Two finished trials, one that was stopped, one that failed, as they lie in a sweep's folder."""
    for name, sigma_1, fid in (("t_0", 4.0, 3.0), ("as_given", 2.0, 5.0)):
        setting = {"spacing": "geometric", "sigma_1": sigma_1, "sigma_L": 0.05, "L": 10}
        rows = [_way(1, None), _way(2, fid), _way(5, fid + 1, snr=0.4)]
        (folder / name).mkdir()
        told = {"setting": setting, "fid": fid, "best": 1, "rows": rows, "n": 500}
        told |= {"checkpoint": {"step": 650}, "extractor": {"name": "digits-classifier"}}
        write_json(folder / name / _trial.DONE, told)
    return [
        _ray.Trial("as_given", {}, {"step": 650, "fid": 5.0}, None),
        _ray.Trial("t_2", {"noise.sigma_1": 9.0}, {"step": 160, "fid": 77.0}, None),
        _ray.Trial("t_0", {"noise.sigma_1": 4.0}, {"step": 650, "fid": 3.0}, None),
        _ray.Trial("t_3", {"noise.sigma_1": 1.0}, {}, "loss or gradient not finite"),
    ]


def test_what_is_published(tmp_path, params):
    found = _trials(tmp_path)
    rows = sorted((tune.row(each, tmp_path) for each in found), key=lambda each: each["fid"] or 1e9)
    assert [each["state"] for each in rows] == ["finished", "finished", "stopped early", "failed"]
    out = tmp_path / "out"
    out.mkdir()
    Image.new("L", (40, 40)).save(tmp_path / "t_0" / "grid.png")
    tune.publish(rows, params, tmp_path, out)
    text = (out / "sweep.txt").read_text().splitlines()
    assert text[1].split()[:4] == ["t_0", "4", "0.05", "10"]
    assert text[1].endswith("annealed Langevin, T = 2, epsilon = 0.001" + " " * 13 + "   21        3")
    assert "stopped early: FID 77 at step 160" in text[3]
    assert "failed: loss or gradient not finite" in text[4]
    compared = "The schedule as given: FID 5, 1.67 times that of the best of 3 others, 1 of them trained to the end."
    assert text[6] == compared
    assert "n = 500, features: digits-classifier, seed 0" in text[8]
    page = (out / "report.html").read_text()
    assert compared in page
    assert "FID <strong>3.000</strong>" in page
    assert page.count("data:image/png") == 4  # three plots, one grid of samples
    assert "stopped early: FID 77 at step 160" in page
    content = read_json(out / "table.json")
    assert {len(cells) for cells in content["data"]} == {len(content["columns"])}
    assert dict(zip(content["columns"], content["data"][0], strict=True))["sigma_1"] == 4.0
    assert read_json(out / "trials.json")["trials"][0]["measured"]["checkpoint"] == {"step": 650}
    for name in ("parallel", "axes", "frontier"):
        assert Image.open(out / f"{name}.png").width > 800
    by_ratio = [{**each, "best": each["ways"][2], "ways": each["ways"][2:]} for each in rows[:2]]
    tune.plot_axes(by_ratio, 500, out / "by_ratio.png")  # no epsilon anywhere
    assert Image.open(out / "by_ratio.png").width > 800


def test_the_schedule_as_given_is_compared_where_it_can_be(tmp_path):
    found = [tune.row(each, tmp_path) for each in _trials(tmp_path)]
    assert tune.verdict(found[:2]) == "The schedule as given: FID 5; no other network was finished."
    failed = tune.row(_ray.Trial(tune.AS_GIVEN, {}, {}, "loss not finite"), tmp_path)
    assert tune.verdict([failed, *found[1:]]) == "The schedule as given failed: loss not finite."


@pytest.mark.parametrize("sde", ["ve", "vp"])
def test_the_best_setting_under_an_sde_composes(tmp_path, sde, monkeypatch):
    """A schedule's spacing is then named after its SDE, which noise.spacing does not know; VP gives no sigma_1."""
    params = _params.parse(compose([f"noise={sde}", "tune.sigma_1=[]"]))
    best = tune.row(_trials(tmp_path)[2], tmp_path)
    best["setting"]["spacing"] = sde
    config = tmp_path / "conf"
    shutil.copytree(_ray.ROOT / "conf", config, ignore=shutil.ignore_patterns("__pycache__"))
    (config / "noise" / "tuned.yaml").write_text(tune.tuned(best, params))
    monkeypatch.setattr(compose_module, "CONF", config)
    noise = _params.parse(compose(["noise=tuned"])).noise
    assert (noise.sde, noise.sigma_1, noise.L) == (sde, 4.0 if sde == "ve" else None, 10)


def test_the_best_setting_is_an_option_that_composes(tmp_path, params, monkeypatch):
    best = tune.row(_trials(tmp_path)[2], tmp_path)
    text = tune.tuned(best, params)
    assert "trial t_0, FID 3 of" in text
    config = tmp_path / "conf"
    shutil.copytree(_ray.ROOT / "conf", config, ignore=shutil.ignore_patterns("__pycache__"))
    (config / "noise" / "tuned.yaml").write_text(text)
    monkeypatch.setattr(compose_module, "CONF", config)
    composed = _params.parse(compose(["noise=tuned"]))
    assert (composed.noise.sigma_1, composed.noise.L, composed.noise.epsilon) == (4.0, 10, 1e-3)
    assert (composed.noise.steps_per_level, composed.sample.denoise, composed.sample.snr) == (2, True, None)
    assert composed.sample.method == "annealed_langevin"
