"""Files are whole or absent."""

import pytest

from pipeline import _store


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
