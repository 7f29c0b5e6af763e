"""Sweeps by Ray Tune over trainings of two workers: a trial that diverges, a driver that is killed, MLflow's view."""

import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline import _params, features
from pipeline._store import read_json
from pipeline.compose import compose
from tests.stages import SETTINGS, Cluster, Stage

pytestmark = pytest.mark.graph

SMALL = ["runtime.workers=2", "features.steps=20", "tune.steps=12", "tune.n=16", "tune.sigma_L=[]", "tune.L=[4]"]
WAYS = ["tune.epsilon=[0.5]", "tune.snr=[0.3]", "tune.steps_per_level=[1]", "tune.consistent=false"]


class Sweep(Stage):
    """`python -m pipeline.tune`, likewise."""

    stage = "tune"
    patience = 900  # seconds: each trial starts a dozen processes, one after the other

    def done(self):
        """When each trial was done, by the trial's name; seconds since 1970."""
        runs = self.folder / "runs"
        return {path.parent.name: path.stat().st_mtime for path in runs.glob("tune-*/*/trial.json")}


def test_four_trials_of_which_one_diverges_survive_the_driver(inside):
    features.main(_params.parse(compose([*SETTINGS, *SMALL])))
    settings = [*SMALL, *WAYS, "tune=grid", "tune.sigma_1=[1,4,1e30]"]  # and the schedule as given
    with Sweep(inside, *settings, name="grid") as sweep:
        sweep.until(lambda: len(sweep.done()) >= 2)  # that of the schedule as given, and one of Ray Tune's
        sweep.kill()
    before = sweep.done()
    assert len(before) == 2
    time.sleep(1)
    with sweep:
        sweep.ends()
    after = sweep.done()
    assert len(after) == 3
    assert before.items() <= after.items()  # what was finished is not done again
    assert "going on with the sweep" in sweep.printed()

    trials = read_json(Path("out/tune/trials.json"))["trials"]
    *finished, failed = trials
    assert (len(finished), {each["state"] for each in finished}) == (3, {"finished"})
    assert (failed["state"], failed["setting"]["sigma_1"]) == ("failed", 1e30)
    assert "not finite" in failed["reason"]
    assert "as_given" in {each["trial"] for each in finished}
    assert [each["fid"] for each in finished] == sorted(each["fid"] for each in finished)
    assert all(len(each["ways"]) == 2 for each in finished)
    composed = _params.parse(compose_here(inside, "noise=tuned"))
    assert composed.noise.sigma_1 == trials[0]["setting"]["sigma_1"]

    client = MlflowClient(f"sqlite:///{inside}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("ncsn").experiment_id])
    parents = {run.data.tags.get("mlflow.parentRunId") for run in runs} - {None}
    (parent,) = parents
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
    assert sorted(run.info.status for run in below) == ["FAILED", *["FINISHED"] * 3]
    (failed,) = (run for run in below if run.info.status == "FAILED")
    assert "not finite" in failed.data.tags["ncsn.reason"]
    for run in below:
        assert next(iter(run.data.metrics)) == "fid"
        if run is not failed:
            assert run.data.metrics["fid"] > 0
            assert {"noise.sigma_1", "best.T"} <= run.data.params.keys()
            kept = {each.path for each in client.list_artifacts(run.info.run_id)}
            assert {"evaluate", "images"} <= kept
    assert client.get_run(parent).info.status == "FINISHED"
    assert "sweep" in {each.path for each in client.list_artifacts(parent)}


@pytest.mark.slow
def test_a_search_that_learns_stops_the_worse_ones_early(inside):
    features.main(_params.parse(compose([*SETTINGS, *SMALL])))
    settings = [*SMALL, *WAYS, "tune=asha", "tune.search=tpe", "tune.trials=4", "tune.sigma_1=[1,8]"]
    with Sweep(inside, *settings, name="tpe") as sweep:
        sweep.ends()
    trials = read_json(Path("out/tune/trials.json"))["trials"]
    assert len(trials) == 5
    assert {each["state"] for each in trials} == {"finished", "stopped early"}
    client = MlflowClient(f"sqlite:///{inside}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("ncsn").experiment_id], order_by=["start_time DESC"])
    parent = next(run.data.tags["mlflow.parentRunId"] for run in runs if "mlflow.parentRunId" in run.data.tags)
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
    states = {"finished": "FINISHED", "stopped early": "KILLED"}
    assert sorted(run.info.status for run in below) == sorted(states[each["state"]] for each in trials)
    assert all({"axis.sigma_1", "axis.epsilon"} <= run.data.params.keys() for run in below)
    assert all(1 <= each["setting"]["sigma_1"] <= 8 for each in trials if each["trial"] != "as_given")


class Ablation(Sweep):
    """`python -m pipeline.ablation`, likewise."""

    stage = "ablation"


class Techniques(Sweep):
    """`python -m pipeline.techniques`, likewise."""

    stage = "techniques"


ONE_SEED = [*SMALL, "runtime.workers=1", "ablation.seeds=[0]"]


def test_schedules_are_compared(inside):
    features.main(_params.parse(compose([*SETTINGS, *ONE_SEED])))
    with Ablation(inside, *ONE_SEED, name="schedules") as stage:
        stage.ends()
    rows = read_json(Path("out/ablation/ablation.json"))["rows"]
    assert [each["name"] for each in rows] == ["geometric", "linear", "geometric, SNR"]
    geometric, linear, by_ratio = rows
    assert all(len(each["fid"]) == 1 for each in rows)
    assert all(each["fid"][0] > 0 for each in rows)
    assert geometric["losses"] == by_ratio["losses"] != linear["losses"]  # one network, and another
    assert by_ratio["ratios"] == pytest.approx([by_ratio["r"]] * 4, rel=1e-4)
    assert linear["sigmas"][0] - linear["sigmas"][1] == pytest.approx(linear["sigmas"][1] - linear["sigmas"][2])
    assert "477.47" in stage.printed()
    assert {each.name for each in Path("out/ablation").iterdir()} == {
        *("ablation.json", "ablation.txt", "curves.png", "grids.png")
    }


@pytest.mark.slow
def test_techniques_are_compared(inside):
    features.main(_params.parse(compose([*SETTINGS, *ONE_SEED])))
    with Techniques(inside, *ONE_SEED, name="techniques") as stage:
        stage.ends()
    rows = {each["name"]: each for each in read_json(Path("out/techniques/techniques.json"))["rows"]}
    assert rows.keys() == {"none", "5", "1, 2, 4", "3", "1, 2, 4, 5", "3, 5", "1, 2, 3, 4", "all"}
    assert (rows["none"]["nfe"], rows["all"]["nfe"]) == (1001, 4 * 2 + 1)
    assert rows["none"]["fid"] != rows["5"]["fid"]


def test_a_cluster_that_is_too_small_for_a_trial_is_said_at_once(inside):
    features.main(_params.parse(compose([*SETTINGS, *SMALL])))
    with Cluster(cpus=1) as cluster, Sweep(inside, *SMALL, *WAYS, name="small", RAY_ADDRESS=cluster.address) as sweep:
        sweep.ends(1)
    assert "runtime.workers=2: a trial needs 2 CPUs, the cluster has 1" in sweep.printed()


def compose_here(folder, *overrides):
    """By the conf/ of a clone."""
    from pipeline import compose as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CONF", folder / "conf")
        return compose([*overrides])
