import dataclasses
import json
import platform
import socket
import subprocess

import pytest
import torch
from mlflow import MlflowClient

from pipeline import _ray, doctor
from pipeline.doctor import OK, PROBLEM, WARNING


def _changed(params, section, **values):
    return dataclasses.replace(params, **{section: dataclasses.replace(getattr(params, section), **values)})


def _found(name, params):
    return list(doctor.checked(name, doctor.CHECKS[name], params))


def _only(name, params):
    (finding,) = _found(name, params)
    return finding.state, finding.told


def test_packages_are_compared_with_the_lock(tmp_path, monkeypatch, params):
    monkeypatch.setattr(_ray, "ROOT", tmp_path)
    assert _only("packages", params)[0] == WARNING
    lock, here = tmp_path / "requirements.lock", torch.__version__.partition("+")[0]
    lock.write_text(f"# header\ntorch=={here}\nno-such-thing==1.0 ; sys_platform == 'win32'\n")
    assert _only("packages", params) == (OK, f"1 as in requirements.lock, torch {torch.__version__}")
    lock.write_text("torch==0.1\n")
    state, told = _only("packages", params)
    assert state == WARNING
    assert f"torch {here} for 0.1: make setup" in told
    lock.write_text("".join(f"no-such-thing-{k}==1.0\n" for k in range(5)))
    state, told = _only("packages", params)
    assert state == PROBLEM
    assert "no-such-thing-0, no-such-thing-1, no-such-thing-2 and 2 more not installed" in told


def test_storage_is_written_to(workdir, params):
    state, told = _only("storage", params)
    assert state == OK
    assert told == f"{workdir}/runs: written, read, removed"
    (workdir / "file").touch()
    state, told = _only("storage", _changed(params, "runtime", storage="file"))
    assert state == PROBLEM
    assert "set runtime.storage" in told


def test_little_room_is_said():
    assert not list(doctor.room(100 * 2**30, "here"))
    assert [each.state for each in doctor.room(5 * 2**30, "here")] == [WARNING]
    (finding,) = doctor.room(2**29, "here")
    assert finding == doctor.Finding("disk", PROBLEM, "0.5 GiB free at here: make room")


def test_mlflow_is_written_to_and_left_as_it_was(workdir, params):
    state, told = _only("mlflow", params)
    assert state == OK
    assert told.startswith(f"sqlite:///{workdir}/mlflow.db")
    client = MlflowClient(f"sqlite:///{workdir}/mlflow.db")
    assert not client.search_runs([client.get_experiment_by_name("ncsn").experiment_id])
    state, told = _only("mlflow", _changed(params, "runtime", tracking_uri="http://u:secret@127.0.0.1:1"))
    assert state == PROBLEM
    assert "no answer: is it up?" in told
    assert "secret" not in told


def test_the_remote_of_dvc_is_written_to(workdir, params):
    assert _only("dvc", params)[0] == PROBLEM
    subprocess.run(["dvc", "init", "-q", "--no-scm"], check=True)
    state, told = _only("dvc", params)
    assert state == OK
    assert told.startswith("no remote")
    subprocess.run(["dvc", "remote", "add", "-q", "-d", "mine", "there"], check=True)
    assert _only("dvc", params) == (OK, f"remote mine, {workdir}/there: written, read, removed")
    assert not list((workdir / "there").iterdir())
    (workdir / "there").rmdir()
    (workdir / "there").touch()
    assert _only("dvc", params)[0] == PROBLEM


def test_data_is_looked_for_and_not_fetched(workdir, params, compose_params, monkeypatch):
    assert _only("data", params) == (OK, "digits: all there, not prepared yet")
    monkeypatch.setenv("NCSN_DATA", str(workdir))
    state, told = _only("data", compose_params("data=cifar10"))
    assert state == WARNING
    assert "cifar-10" in told
    assert "python -m pipeline.fetch" in told
    state, told = _only("data", compose_params("data=image_folder", "data.root=nowhere", "data.resolution=16"))
    assert state == PROBLEM
    assert "data.root=nowhere does not exist" in told


def test_weights_are_missed_only_where_they_are_asked_for(workdir, params, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(workdir))
    assert _only("weights", params)[0] == OK
    state, told = _only("weights", _changed(params, "evaluate", extractor="inception-v3-compat"))
    assert state == PROBLEM
    assert "python -m pipeline.fetch" in told


def test_a_cluster_that_does_not_answer_is_said(params, monkeypatch):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        state, told = _only("ray", params)  # bound, but nobody listens
        busy.listen()
        assert doctor.reached(address) == doctor.Finding("port", OK, f"{address} answers")
    assert state == PROBLEM
    assert f"nothing answers at {address} (Connection refused)" in told


def _met(rank, **other):
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    told = {"rank": rank, "size": 2, "host": f"host{rank}", "device": "cuda:0", "sum": 3.0, "backend": "nccl"}
    return told | {"versions": versions, "storage": None, "free": 2**40} | other


def test_workers_are_compared():
    (finding,) = doctor.compared([_met(0), _met(1)])
    assert finding == doctor.Finding("workers", OK, "2 on host0, host1, cuda:0, numbers added up by nccl")
    first, *_ = doctor.compared([_met(0), _met(1, sum=1.0)])
    assert first.state == PROBLEM
    assert "ranks [1] added up wrongly" in first.told
    _, other = doctor.compared([_met(0), _met(1, versions={"python": "3.9.1", "torch": torch.__version__})])
    assert other.state == PROBLEM
    assert "python 3.9.1 on host1" in other.told
    _, storage, disk = doctor.compared([_met(0), _met(1, storage="storage s3://x: no credentials", free=0)])
    assert (storage.what, storage.state) == ("storage", PROBLEM)
    assert storage.told == "from host1: storage s3://x: no credentials"
    assert disk.state == PROBLEM


@pytest.mark.usefixtures("one_cluster")
def test_all_is_well_here(workdir, params, capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:  # in an empty folder
        doctor.main(params, as_json=True)
    assert ended.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert {each["what"] for each in found} >= {"python", "packages", "storage", "mlflow", "data", "ray", "workers"}
    assert [each["what"] for each in found if each["state"] == PROBLEM] == ["dvc"]
    (met,) = (each["told"] for each in found if each["what"] == "workers")
    assert met == f"1 on {socket.gethostname()}, cpu"
    subprocess.run(["dvc", "init", "-q", "--no-scm"], check=True)
    monkeypatch.delitem(doctor.CHECKS, "ray")  # once is enough
    doctor.main(params)
    lines = capsys.readouterr().out.splitlines()
    assert [text.split()[1] for text in lines][:2] == ["python", "git"]
    assert not any(text.startswith(PROBLEM) for text in lines)
