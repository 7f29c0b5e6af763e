"""Numbers that are alike are ranked, others refused. The passports are made by the functions of the stage evaluate."""

import copy
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from pipeline import _extractors, _stage, _track, compare, evaluate, prepare
from pipeline._params import Params
from pipeline._stage import StageError
from pipeline._store import read_json, write_json

WEIGHTS, REFERENCE = "ab" * 32, "cd" * 32
IMAGES = np.zeros((0, 1, 8, 8), np.uint8)
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> evaluate.Passport:
    """What passports of one data set, extractor and code have in common, from `evaluate.provenance`."""
    extractor = _extractors.Extractor("digits-classifier", Path("x"), WEIGHTS, 0.98)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("data"))
        train = {"n": 1438, "sha256": REFERENCE}
        write_json(prepare.OUT / "manifest.json", {"name": "digits", "shape": [1, 8, 8], "splits": {"train": train}})
        patch.setattr(evaluate, "code_digest", lambda *paths: "0" * 64)
        patch.setattr(evaluate._track, "revision", lambda: "ef" * 20)
        return evaluate.provenance(extractor)


@pytest.fixture
def make(workdir: Path, common: evaluate.Passport) -> Make:
    """Writes name/out/evaluate with some numbers, each of n images and of 359; `changed` has other fields by name."""

    def write(name: str, n: int = 1000, changed: dict[str, Any] | None = None, **values: float) -> Path:
        manifest = {
            "seed": 0,
            "weights": "ema",
            "selection": None,
            "weights_sha256": WEIGHTS,
            "step": 600,
            "sampler": {"name": "annealed_langevin", "L": 4, "epsilon": 1e-5, "denoise": True},
            "nfe": 21,
        }
        images = evaluate.ImageSet(IMAGES, manifest)
        settings = {"is": {"isc_splits": 10, "seed": 0}, "kid": {"kid_subsets": 100, "kid_subset_size": 359, "seed": 0}}
        passports = []
        for count, suffix in ((n, ""), (359, ".samples"), (359, ".untrained")):
            for metric, value in values.items():
                std = 0.25 if metric in settings else None
                score = evaluate.Score(metric, value, std, "features", settings.get(metric))
                full = f"{metric}_digits_{evaluate.thousands(count)}{suffix}"
                kind = "untrained" if suffix == ".untrained" else "samples"
                one = evaluate.passport(full, score, kind, count, images, copy.deepcopy(common))
                passports.append({**one, "rank_deficient": count <= 64})
        for field, value in (changed or {}).items():
            *groups, last = field.split(".")
            for each in passports:
                within = each
                for group in groups:
                    within = within[group]
                within[last] = value
        folder = Path(name) / evaluate.OUT
        folder.mkdir(parents=True)
        evaluate.write(folder, passports)
        return folder

    return write


@pytest.fixture
def run(params: Params, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Compares runs, and returns what is printed."""

    def call(*runs: str | Path, metric: list[str] | None = None, force: bool = False, as_json: bool = False) -> str:
        compare.main(params, [str(each) for each in runs], metric, None, force, as_json)
        return capsys.readouterr().out

    return call


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell]


def test_alike_numbers_are_ranked_best_first_each_by_its_own_direction(make: Make, run: Callable[..., str]) -> None:
    make("a", fid=3.0, precision=0.5, kid=2e-3)
    make("b", fid=2.0, precision=0.25, kid=3e-3, recall=0.5)
    make("c", fid=4.0, precision=0.75, kid=2e-3)
    header, *lines = run("a", "b", "c").splitlines()
    assert cells(header) == ["run", "fid", "kid", "precision"]  # b alone has recall
    assert [cells(line) for line in lines] == [
        ["b", "2.000 (1)", "0.003000±0.25 (3)", "0.2500 (3)"],
        ["a", "3.000 (2)", "0.002000±0.25 (1)", "0.5000 (2)"],
        ["c", "4.000 (3)", "0.002000±0.25 (1)", "0.7500 (1)"],
    ]
    assert len({len(line) for line in (header, *lines)}) == 1  # aligned
    assert [line[0] for line in run("a", "b", "c", metric=["precision"]).splitlines()[1:]] == ["c", "a", "b"]


def test_what_is_compared_is_shown_where_it_differs(make: Make, run: Callable[..., str]) -> None:
    make("a", fid=3.0)
    others = {
        "checkpoint.step": 900,
        "checkpoint.sha256": "12" * 32,
        "checkpoint.weights": "initial",
        "sampler.epsilon": 2e-5,
        "nfe": 42,
        "seeds.seed": 1,
        "code.revision": "34" * 20 + "-dirty",
    }
    make("b", fid=2.0, changed=others)
    groups, header, first, second = run("a", "b").splitlines()
    columns = dict(zip(cells(header)[2:], zip(cells(first)[2:], cells(second)[2:], strict=True), strict=True))
    assert columns == {
        "seed": ("1", "0"),
        "sha256": ("12121212", "abababab"),
        "step": ("900", "600"),
        "weights": ("initial", "ema"),
        "epsilon": ("2e-05", "1e-05"),
        "nfe": ("42", "21"),
        "revision": ("34343434-dirty", "efefefef"),
    }
    assert cells(groups) == ["seeds", "checkpoint", "checkpoint", "checkpoint", "sampler", "code"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("reference.data", "mnist", "it is digits in a and mnist in b"),
        ("reference.split", "test", "it is train in a and test in b"),
        ("reference.n", 500, "it is 1438 in a and 500 in b"),
        ("reference.sha256", "12" * 32, "it is cdcdcdcd in a and 12121212 in b"),
        ("extractor.name", "inception-v3-compat", "it is digits-classifier in a and inception-v3-compat in b"),
        ("extractor.weights_sha256", "12" * 32, "it is abababab in a and 12121212 in b"),
        ("extractor.layer", "logits", "it is features in a and logits in b"),
        ("preprocessing", "uint8", "it is uint8, no resize, grey repeated to 3 channels in a and uint8 in b"),
        ("settings", {"kid_subsets": 9}, None),
    ],
)
def test_unlike_numbers_are_refused(
    make: Make, run: Callable[..., str], field: str, value: Any, message: str | None
) -> None:
    make("a", fid=3.0)
    make("b", fid=2.0, changed={field: value})
    message = message or "it is null in a and 9 in b"
    with pytest.raises(StageError) as error:
        run("a", "b")
    name = "settings.kid_subsets" if field == "settings" else field
    assert str(error.value) == f"fid cannot be ranked: {name} differs, {message}; --force shows them marked"


def test_another_number_of_images_is_refused_and_what_all_have_is_named(make: Make, run: Callable[..., str]) -> None:
    make("a", n=1000, fid=3.0, kid=2e-3)
    make("b", n=500, fid=2.0, kid=1e-3, changed={"extractor.test_accuracy": 0.9})
    with pytest.raises(StageError) as error:
        run("a", "b")
    assert str(error.value) == (
        "fid cannot be ranked: n differs, it is 1000 in a and 500 in b; --force shows them marked, "
        "--metric fid_digits_359.samples ranks what is alike in all"
    )
    lines = run("a", "b", metric=["fid_digits_359.samples"]).splitlines()
    assert cells(lines[-2])[:2] == ["b", "2.000 (1)"]
    assert cells(lines[-1])[:2] == ["a", "3.000 (2)"]


def test_all_that_differs_is_named(make: Make, run: Callable[..., str]) -> None:
    make("a", kid=3.0)
    make(
        "b", kid=2.0, changed={"settings.kid_subset_size": 7, "extractor.weights_sha256": "1" * 64, "settings.seed": 5}
    )
    with pytest.raises(StageError, match=r"weights_sha256 differs, .*; so do settings.kid_subset_size; --force"):
        run("a", "b")


def test_force_shows_unlike_numbers_marked_last_and_without_a_place(make: Make, run: Callable[..., str]) -> None:
    make("a", fid=3.0, precision=0.5)
    make("b", n=64, fid=1.0, precision=0.9)
    make("c", fid=2.0, precision=0.25)
    _, header, *lines = run("a", "b", "c", force=True).splitlines()
    assert cells(header) == ["run", "fid", "precision", "last"]
    assert [cells(line) for line in lines[:4]] == [
        ["c", "2.000 (1)", "0.2500 (2)", "999"],
        ["a", "3.000 (2)", "0.5000 (1)", "999"],
        ["b", "1.000 (unlike)", "0.9000 (unlike)", "63"],
        [],
    ]
    assert lines[4:] == [
        "b is not ranked by fid, precision: n is 64, not 1000",
        "fid of b is rank-deficient: no more images than features",
    ]


def test_notes_name_each_field_once(make: Make, run: Callable[..., str]) -> None:
    make("a", fid=3.0, kid=0.5)
    make("b", fid=1.0, kid=0.5, changed={"extractor.weights_sha256": "1" * 64})
    make("c", fid=1.0, kid=0.5)
    content = read_json(file := Path("c") / evaluate.OUT / "passports.json")
    (kid,) = (each for each in content["passports"] if each["name"] == "kid_digits_1k")
    kid["settings"]["kid_subset_size"] = 9
    kid["n"] = 9
    write_json(file, content)
    assert run("a", "b", "c", force=True).splitlines()[-2:] == [
        "c is not ranked by kid: n is 9, not 1000; settings.kid_subset_size is 9, not 359",
        "b is not ranked by fid, kid: extractor.weights_sha256 is 11111111, not abababab",
    ]


def test_json_has_the_table(make: Make, run: Callable[..., str]) -> None:
    make("a", fid=3.0)
    make("b", n=500, fid=1.0)
    make("c", fid=2.0, changed={"nfe": 42})
    found = json.loads(run("a", "b", "c", force=True, as_json=True))
    assert found["metrics"] == ["fid"]
    assert [row["run"] for row in found["rows"]] == ["c", "a", "b"]
    assert [row["scores"]["fid"]["place"] for row in found["rows"]] == [1, 2, None]
    assert [row["differing"]["nfe"] for row in found["rows"]] == [42, 21, 21]
    assert found["rows"][2]["scores"]["fid"] == {
        "name": "fid_digits_500",
        "value": 1.0,
        "std": None,
        "n": 500,
        "rank_deficient": False,
        "place": None,
        "unlike": {"n": {"first": 1000, "this": 500}},
    }


def test_files_and_folders_are_found(make: Make, run: Callable[..., str]) -> None:
    folder = make("a", fid=3.0)
    for given in ("a", folder, folder / "passports.json"):
        assert cells(run(given).splitlines()[1]) == [str(given), "3.000 (1)"]


def test_a_file_of_another_kind_is_an_error(make: Make, run: Callable[..., str], workdir: Path) -> None:
    content = read_json(make("a", fid=3.0) / "passports.json")
    del content["passports"][1]["preprocessing"]
    write_json(workdir / "old.json", content)
    (workdir / "binary").write_bytes(b"\xff\x00")
    (workdir / "list.json").write_text("[1]")
    write_json(workdir / "entries.json", {"passports": [1], "reason": None})
    Path("none").mkdir()
    evaluate.write(Path("none"), [], "nothing was measured: no labels")
    (workdir / "empty").mkdir()
    for given, message in {
        "old.json": "old.json has a passport without 'preprocessing': write it anew with `dvc repro evaluate`",
        "binary": "binary is no passports.json as the stage evaluate writes it: expected that file",
        "list.json": "list.json is no passports.json as the stage evaluate writes it: expected that file",
        "entries.json": "entries.json is no passports.json as the stage evaluate writes it: expected that file",
        "none": "none has no numbers: nothing was measured: no labels",
        "empty": "empty holds no passports.json, no evaluate/passports.json, no out/evaluate/passports.json: `dvc",
    }.items():
        with pytest.raises(StageError) as error:
            run("a", given)
        assert str(error.value).startswith(message)


def test_a_metric_that_is_not_there_is_an_error(make: Make, run: Callable[..., str]) -> None:
    make("a", fid=3.0)
    make("b", kid=3.0)
    with pytest.raises(StageError, match="a, b have none of fid, is, kid, precision, recall in common"):
        run("a", "b")
    make("c", fid=3.0, share_0=0.1)
    names = "fid_digits_1k, fid_digits_359.samples, fid_digits_359.untrained"
    for metric in ("kid", "share_0", "fid_digits_360.samples"):
        with pytest.raises(StageError, match=f"--metric {metric}: expected fid, is, .*, or, for c, {names}"):
            run("c", metric=[metric])


def test_the_program_refuses_with_exit_status_1(
    make: Make, workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make("a", fid=3.0)
    make("b", n=500, fid=2.0)
    (workdir / "params.yaml").write_text((Path(__file__).parents[2] / "params.yaml").read_text())

    def program(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["compare", *words])
        _stage.run("compare", compare.__doc__, compare.main, compare.options)

    with pytest.raises(SystemExit) as end:
        program("a", "b")
    assert str(end.value.code).startswith("error: fid cannot be ranked: n differs")
    assert "\n" not in str(end.value.code)
    assert capsys.readouterr().out == ""
    program("a", "b", "--force", "--metric", "fid", "--json")
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2


def test_runs_of_mlflow_are_found_by_id_beginning_and_name(
    make: Make, workdir: Path, params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(_track, "AGAIN", 0.1)

    def compared(*runs: str) -> list[list[str]]:
        compare.main(params, list(runs), None, None, False, False)
        return [cells(line)[:2] for line in capsys.readouterr().out.splitlines()[1:]]

    with pytest.raises(StageError, match=r"abc is no file and no folder, and there is no MLflow at sqlite:.*mlflow.db"):
        compared("abc")
    assert not Path("mlflow.db").exists()

    for seed, value in ((0, 3.0), (1, 2.0), (2, None)):
        with _track.run(dataclasses.replace(params, evaluate=dataclasses.replace(params.evaluate, seed=seed))) as run:
            if value is not None:
                run.artifact(make(f"seed{seed}", fid=value) / "passports.json", "evaluate")
            run.finish()
    client = MlflowClient(f"sqlite:///{workdir}/mlflow.db")
    experiment = client.get_experiment_by_name("ncsn")
    infos = [each.info for each in client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])]
    first, second, bare = infos
    size = next(k for k in range(1, 33) if len({info.run_id[:k] for info in infos}) == 3)
    labels = [f"{info.run_name} {info.run_id[:8]}" for info in infos]
    expected = [[labels[1], "2.000 (1)"], [labels[0], "3.000 (2)"]]
    assert compared(first.run_id, second.run_id) == expected
    assert compared(first.run_id[:size], second.run_name) == expected
    assert compared("seed0", second.run_id) == [expected[0], ["seed0", "3.000 (2)"]]

    with pytest.raises(StageError, match=f"run {labels[2]} of MLflow at .* has no evaluate/passports.json, it was"):
        compared(bare.run_id)
    with pytest.raises(StageError, match="it's is no file, no folder and no run of MLflow at sqlite:"):
        compared("it's")
    again = client.create_run(experiment.experiment_id, run_name=first.run_name).info.run_id
    both = " or ".join(sorted((first.run_id, again)))
    with pytest.raises(StageError, match=f"{first.run_name} is 2 runs of MLflow at .*: expected the id of one, {both}"):
        compared(first.run_name)
    with pytest.raises(StageError, match=r"MLflow at nowhere://x: .*: set --tracking-uri, MLFLOW_TRACKING_URI or"):
        compare.main(params, ["abc"], None, "nowhere://x", False, False)
