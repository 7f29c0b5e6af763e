"""Files and objects that are whole or absent: in a folder, or under an S3 prefix; the only importer of boto3.

Local files are written under a temporary name, synced and renamed; an S3 object appears when its upload is complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`, on an error it is removed.

    Works for a file or a folder. A reader never sees a half-written `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        for file in [part] if part.is_file() else part.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.is_dir():
            shutil.rmtree(path)
        part.replace(path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path | str) -> Iterator[Path]:
    """As `replacing`, with the temporary folder already made."""
    with replacing(path) as part:
        part.mkdir()
        yield part


@dataclass(frozen=True)
class Folder:
    """Named objects below a local folder; a plain value. `bucket`'s twin, see `store`."""

    uri: str

    def __truediv__(self, name: str) -> "Folder":
        """The store below this one."""
        return Folder(f"{self.uri}/{name}")

    def write(self, name: str, content: bytes | Path) -> None:
        """Store bytes, or a copy of a file, whole or not at all."""
        with replacing(self._path(name)) as part:
            if isinstance(content, Path):
                shutil.copyfile(content, part)
            else:
                part.write_bytes(content)

    def read(self, name: str) -> bytes:
        """The content; raises FileNotFoundError."""
        return self._path(name).read_bytes()

    def fetch(self, name: str, path: Path) -> None:
        """Copy an object to a local file, whole or not at all; raises FileNotFoundError."""
        with replacing(path) as part:
            shutil.copyfile(self._path(name), part)

    def names(self) -> list[str]:
        """The names of all objects, sorted, with / between their parts."""
        root = Path(self.uri)
        found = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        return sorted(name for name in found if not name.endswith(".part"))

    def remove(self, name: str) -> None:
        """Remove an object, or all whose names begin with name/; nothing if there is none."""
        path = self._path(name)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise StageError, with the fix, unless objects can be written, read and removed here."""

    def _path(self, name: str) -> Path:
        return Path(self.uri, name)


def store(uri: str) -> Folder:
    """The store of a folder or of s3://bucket/prefix."""
    return Folder(str(Path(uri).resolve()))


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON atomically, indented; NaN and infinity are refused (ValueError), since JSON has no such numbers."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256(path: Path | str) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Twelve hex digits that name a JSON value; equal values have equal names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def code_digest(*paths: str) -> str:
    """One digest over the Python sources of modules or packages, given relative to the project's root."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in paths:
        start = root / path
        for file in sorted(start.rglob("*.py")) if start.is_dir() else [start]:
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
