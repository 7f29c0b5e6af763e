"""Several samplers with one network: what each costs, and which to pick."""

import pytest
from PIL import Image

from pipeline import features, frontier, prepare, sample, schedule, select, train
from pipeline._store import read_json, replacing_folder
from tests.pipeline.doubles import Recorder


def _row(nfe, fid, **other):
    return {
        "method": "annealed_langevin",
        "T": 1,
        "epsilon": 1e-3,
        "snr": None,
        "denoise": True,
        "nfe": nfe,
        "seconds": None,
        "fid": fid,
        "reason": None if fid else "images are not finite",
    } | other


def test_the_cheapest_that_is_nearly_the_best_is_picked():
    rows = [_row(10, 9.0), _row(20, 9.5), _row(30, 4.1), _row(40, None), _row(60, 4.0, T=5), _row(70, 4.05)]
    assert [each["nfe"] for each in frontier.frontier(rows)] == [10, 30, 60]
    told = frontier.advice(rows)
    assert "Best: annealed Langevin, T = 5, epsilon = 0.001, FID 4 at 60 evaluations an image." in told
    assert "Pick: annealed Langevin, T = 1, epsilon = 0.001, FID 4.1 at 30: the cheapest within 5% of it." in told
    assert "annealed Langevin, T = 1, SNR = 0.2, not denoised" in frontier.words(_row(1, 1.0, snr=0.2, denoise=False))
    table = frontier.table(rows)
    assert table.count("* annealed") == 3
    assert "annealed Langevin, T = 1, epsilon = 0.001: images are not finite" in table
    assert frontier.advice([_row(40, None)]) == "No setting drew images: see the reasons above."


@pytest.mark.usefixtures("one_cluster", "workdir")
def test_settings_are_drawn_judged_and_pictured(compose_params, monkeypatch, capsys):
    params = compose_params("experiment=tiny", "noise.L=8", "features.steps=20", "sample.shard_size=8")
    prepare.main(params)
    schedule.main(params)
    features.main(params)
    network = train.describe(params.model, 1, schedule.load())
    initial = train.initial_network(network, 0).state_dict()
    with replacing_folder(train.OUT) as out:
        train.write_model(out, initial, initial, {"network": network, "space": "pixels", "step": 3})
    select.main(params)
    recorder = Recorder()
    monkeypatch.setattr(frontier._track, "run", recorder.run)
    frontier.main(params, n=8, steps=[1], factors=[0.5, 1e45], levels=[5])
    found = read_json(frontier.OUT / "frontier.json")
    rows = found["rows"]
    assert (found["n"], found["seeds"]["last"], found["checkpoint"]["step"]) == (8, 7, 3)
    methods = [(each["method"], each["denoise"], each["nfe"]) for each in rows]
    assert methods.count(("consistent", True, 8)) == 2
    assert ("annealed_langevin", False, 16) in methods
    assert {("heun", True, 9), ("dpmpp", True, 5), ("dpmpp_sde", True, 5)} < set(methods)
    assert sum(each["snr"] is not None for each in rows) == 2
    wild = [each for each in rows if each["reason"]]
    assert {each["reason"].partition(" with ")[2].partition("=")[0] for each in wild} == {"noise.epsilon", "sample.snr"}
    assert all(each["fid"] > 0 and each["seconds"] > 0 for each in rows if not each["reason"])
    assert Image.open(frontier.OUT / "frontier.png").width > 800
    assert "Pick: " in capsys.readouterr().out
    assert "frontier/frontier.png" in map(str, recorder.files)
    again = frontier.draw(
        frontier.settings(sample.make_sampler(params, "ema"), [1], [0.5], [5]), sample.weights("ema"), 8, params
    )
    assert len(again) == len(rows) - 2
    told = {frontier.words(each): each["seconds"] for each in rows}
    assert all(each["seconds"] == told[frontier.words(each)] for each in again)  # all were there
