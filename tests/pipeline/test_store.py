"""Files are whole or absent."""

import os
import time

import pytest

from pipeline import _store
from pipeline._stage import StageError


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path):
    path = tmp_path / "a" / "file.txt"
    _store.write_text(path, "old")
    with pytest.raises(ValueError, match="stop"), _store.replacing(path) as part:
        part.write_text("half")
        raise ValueError("stop")
    assert path.read_text() == "old"
    assert [child.name for child in path.parent.iterdir()] == ["file.txt"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for name in ("first", "second"):
        with _store.replacing_folder(tmp_path / "folder") as part:
            (part / name).write_text(name)
            (part / "sub").mkdir()
            (part / "sub" / name).write_text(name)
    assert sorted(p.name for p in (tmp_path / "folder").rglob("*") if p.is_file()) == ["second", "second"]
    with pytest.raises(ValueError, match="stop"), _store.replacing_folder(tmp_path / "folder") as part:
        (part / "third").write_text("")
        raise ValueError("stop")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "second").exists()


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    _store.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        _store.write_json(path, {"a": float("nan")})
    assert _store.read_json(path) == {"a": 1}


def test_fingerprint_depends_on_content_not_on_order():
    assert _store.fingerprint({"a": 1, "b": [2]}) == _store.fingerprint({"b": [2], "a": 1})
    assert _store.fingerprint({"a": 1}) != _store.fingerprint({"a": 2})


def test_code_digest_follows_the_sources():
    assert _store.code_digest("ncsn") == _store.code_digest("ncsn")
    assert _store.code_digest("ncsn") != _store.code_digest("ncsn/noise.py")


def test_half_written_objects_are_not_named(tmp_path):
    where = _store.store(str(tmp_path))
    (where / "a").write("b", b"1")
    (tmp_path / "a" / ".b.1.part").write_bytes(b"")
    (tmp_path / ".c.1.part").mkdir()
    (tmp_path / ".c.1.part" / "d").write_bytes(b"")
    assert where.names() == ["a/b"]


def test_what_killed_writers_left_is_removed_after_a_day(tmp_path):
    for name, hours in ((".old.1.part", 25), (".new.1.part", 1), ("old", 25)):
        path = tmp_path / "step" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
        os.utime(path, (time.time() - hours * 3600,) * 2)
    _store.store(str(tmp_path)).check()
    assert sorted(path.name for path in (tmp_path / "step").iterdir()) == [".new.1.part", "old"]


def test_a_folder_that_is_none_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match=r"file: File exists: make it a folder that can be written, or set"):
        _store.store(str(tmp_path / "file")).check()


@pytest.mark.root
def test_a_full_disk_leaves_what_was_there(small_disk, tmp_path):
    folder = small_disk(4)
    where = _store.store(str(folder))
    where.check()
    where.write("state", bytes(2 << 20))
    (tmp_path / "big").write_bytes(b"1" * (3 << 20))
    for content in (b"1" * (3 << 20), tmp_path / "big"):
        with pytest.raises(StageError, match=r"/state cannot be written: No space left on device: make room there"):
            where.write("state", content)
    assert [path.name for path in folder.iterdir()] == ["state"]
    assert where.read("state") == bytes(2 << 20)
    where.write("more", bytes(3 << 19))
    with pytest.raises(StageError, match=r"No space left on device: make room there, or set runtime\.storage"):
        where.check()


@pytest.mark.root
def test_a_folder_that_cannot_be_written_is_named(small_disk):
    folder = small_disk(1, "ro")
    with pytest.raises(StageError, match=r"Read-only file system: make it a folder that can be written"):
        _store.store(str(folder)).check()
