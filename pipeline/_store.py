"""Files and objects that are whole or absent: in a folder, or under an S3 prefix; the only importer of boto3.

Local files are written under a temporary name, synced and renamed; an S3 object appears when its upload is complete.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipeline._stage import StageError, log

T = TypeVar("T")
FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a full disk


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
    """Named objects below a local folder; a plain value."""

    uri: str

    def __truediv__(self, name: str) -> Folder:
        """The store below this one."""
        return Folder(f"{self.uri}/{name}")

    def write(self, name: str, content: bytes | Path) -> None:
        """Store bytes, or a copy of a file, whole or not at all; raises StageError if the disk is full."""
        with _room(self._path(name)), replacing(self._path(name)) as part:
            if isinstance(content, Path):
                shutil.copyfile(content, part)
            else:
                part.write_bytes(content)

    def read(self, name: str) -> bytes:
        """The content; raises FileNotFoundError."""
        return self._path(name).read_bytes()

    def fetch(self, name: str, path: Path) -> None:
        """Copy an object to a local file, whole or not at all; raises FileNotFoundError."""
        with _room(path), replacing(path) as part:
            shutil.copyfile(self._path(name), part)

    def names(self) -> list[str]:
        """The names of all objects, sorted, with / between their parts."""
        root = Path(self.uri)  # by os.walk, which passes over folders that vanish meanwhile
        found = (Path(folder, file).relative_to(root) for folder, _, files in os.walk(root) for file in files)
        return sorted(name.as_posix() for name in found if not any(part.endswith(".part") for part in name.parts))

    def remove(self, name: str) -> None:
        """Remove an object, or all whose names begin with name/, at once; nothing if there is none."""
        path = self._path(name)
        if path.is_dir():
            going = path.with_name(f".{path.name}.{os.getpid()}.part")
            path.replace(going)
            shutil.rmtree(going)
        path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise StageError, with the fix, unless objects can be written, read and removed here.

        Removes what writers that were killed have left, a day old or older.
        """
        try:
            _probe(self)
            for part in list(Path(self.uri).rglob(".*.part")):
                if time.time() - part.stat().st_mtime > 24 * 3600:
                    shutil.rmtree(part) if part.is_dir() else part.unlink()
        except OSError as error:
            fix = "make it a folder that can be written, or set runtime.storage"
            raise StageError(f"storage {self.uri}: {error.strerror}: {fix}") from None

    def _path(self, name: str) -> Path:
        return Path(self.uri, name)


@dataclass(frozen=True)
class Bucket:
    """Named objects under s3://bucket/prefix; `Folder`'s twin, a plain value that may travel to workers.

    Endpoint and credentials come from where all AWS tools take them: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_PROFILE and so on. A file above 8 MB goes in parts, several at a time.

    A server that does not answer, or answers that the fault is its own, is tried again for `patience` seconds, with one
    warning. After them, and at once where waiting mends nothing (credentials, no such bucket), all methods raise
    StageError. Neither names nor messages hold credentials.
    """

    uri: str
    patience: float = 180.0

    def __truediv__(self, name: str) -> Bucket:
        """The store below this one."""
        return replace(self, uri=f"{self.uri}/{name}")

    def write(self, name: str, content: bytes | Path) -> None:
        """Store bytes, or a copy of a file; it appears, in place of what was there, when all of it has arrived."""

        def put(client: Any) -> None:
            with open(content, "rb") if isinstance(content, Path) else io.BytesIO(content) as file:
                client.upload_fileobj(file, self._bucket, self._key(name))

        self._patiently(put)

    def read(self, name: str) -> bytes:
        """The content; raises FileNotFoundError."""

        def get(client: Any) -> bytes:
            return client.get_object(Bucket=self._bucket, Key=self._key(name))["Body"].read()

        return self._patiently(get, name)

    def fetch(self, name: str, path: Path) -> None:
        """Copy an object to a local file, whole or not at all; raises FileNotFoundError."""
        with _room(path), replacing(path) as part:
            self._patiently(lambda client: client.download_file(self._bucket, self._key(name), str(part)), name)

    def names(self) -> list[str]:
        """The names of all objects, sorted, with / between their parts."""
        start = self._key("")
        # Markers of folders are no objects of ours.
        return [key[len(start) :] for key in self._patiently(partial(self._keys, start)) if not key.endswith("/")]

    def remove(self, name: str) -> None:
        """Remove an object, or all whose names begin with name/, in their order; nothing if there is none."""

        def delete(client: Any) -> None:
            for key in [self._key(name), *self._keys(f"{self._key(name)}/", client)]:  # not all servers take a list
                client.delete_object(Bucket=self._bucket, Key=key)

        self._patiently(delete)

    def check(self) -> None:
        """Raise StageError, with the fix, unless objects can be written, read and removed here; waits 10 s."""
        _probe(replace(self, patience=min(self.patience, 10.0)))

    @property
    def _bucket(self) -> str:
        return self.uri.removeprefix("s3://").split("/")[0]

    def _key(self, name: str) -> str:
        prefix = self.uri.removeprefix("s3://").partition("/")[2]
        return f"{prefix}/{name}" if prefix else name

    def _keys(self, start: str, client: Any) -> list[str]:
        # Without a delimiter: with one, servers that keep folders show those which have become empty.
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=start)
        return sorted(found["Key"] for page in pages for found in page.get("Contents", []))

    def _patiently(self, do: Callable[[Any], T], name: str | None = None) -> T:
        """The value of `do(client)`, called until the server is well; `name` is the object that may be missing."""
        client, since = _client(), None
        while True:
            try:
                value = do(client)
            except Exception as error:
                fault, fix = _diagnosis(error)
                if fault is None:
                    raise
                if name is not None and fault in MISSING:
                    raise FileNotFoundError(f"{self.uri}/{name}") from None
                where = f"storage {self.uri} at {client.meta.endpoint_url}"
                if since is None:
                    since = time.monotonic()
                    if fix is None:
                        log.warning("%s: %s; trying again for %.0f s", where, fault, self.patience)
                waited = time.monotonic() - since
                if fix is None and waited > self.patience:
                    fix = f"still so after {waited:.0f} s: is it up, its disk not full?"
                if fix is not None:
                    raise StageError(f"{where}: {fault}: {fix}") from None
                time.sleep(min(0.5 + waited / 4, 5))
            else:
                if since is not None:
                    log.warning("storage %s: well again after %.0f s", self.uri, time.monotonic() - since)
                return value


Store = Folder | Bucket


def store(uri: str) -> Store:
    """The store of a folder or of s3://bucket/prefix; nothing is opened yet."""
    if uri.startswith("s3:"):
        if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+(/[^/]+)*/?", uri):
            raise StageError(f"storage {uri}: expected s3://bucket/prefix or a folder: set runtime.storage")
        return Bucket(uri.rstrip("/"))
    if "://" in uri:
        raise StageError(f"storage {uri}: expected s3://bucket/prefix or a folder: set runtime.storage")
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


@contextmanager
def _room(path: Path) -> Iterator[None]:
    """Within it a full disk is a StageError."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        fix = "make room there, or set runtime.storage"
        raise StageError(f"{path} cannot be written: {error.strerror}: {fix}") from error


def _probe(where: Store) -> None:
    name, content = f".probe-{uuid.uuid4().hex}", bytes(1 << 20)
    where.write(name, content)
    found = where.read(name)
    where.remove(name)
    if found != content:
        raise StageError(f"storage {where.uri}: what was written is not what is read: set runtime.storage")


def _client() -> Any:
    """The S3 client for the environment as it is, one a process; threads may share it."""
    return _connect(tuple((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))


@functools.cache
def _connect(_: tuple[tuple[str, str], ...]) -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise StageError(f"s3:// needs {error.name}: pip install 'ncsn[s3]'") from None
    try:
        return boto3.session.Session().client(
            "s3", config=Config(connect_timeout=5, read_timeout=60, retries={"mode": "standard", "max_attempts": 3})
        )
    except (BotoCoreError, ValueError) as error:
        raise StageError(f"s3:// cannot be used: {error}: see the variables AWS_*") from None


MISSING = {"404", "NoSuchKey"}
# What another request mends: a restarted server may have forgotten the parts of an upload.
PASSING = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "NoSuchUpload", "InvalidPart"}


def _diagnosis(error: Exception) -> tuple[str | None, str | None]:
    """What is wrong with S3, None if the error is not about S3; and what the person must do, None if it may pass.

    The server's own message is left out: it may repeat the key.
    """
    import boto3.exceptions
    from botocore import exceptions, parsers

    if isinstance(error, exceptions.ClientError):
        code = str(error.response["Error"]["Code"])
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if code in PASSING or status == 429 or (status >= 500 and status != 501):
            return f"the server answers {code} ({status})", None
        if code == "NoSuchBucket":
            return "there is no such bucket", "make it, or set runtime.storage"
        if code in MISSING:
            return code, "set runtime.storage"
        if code == "RequestTimeTooSkewed":
            return "the server's clock differs from ours", "set the clock"
        if status in (401, 403):
            return f"access is refused ({code})", (
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to credentials that may list, read, "
                "write and delete there"
            )
        return f"the server answers {code} ({status}) to {error.operation_name}", "does it speak S3 in full?"
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return "no credentials", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, exceptions.SSLError):
        return "the certificate is not trusted", "set AWS_CA_BUNDLE, or AWS_ENDPOINT_URL to http://"
    if isinstance(error, exceptions.BotoCoreError | boto3.exceptions.Boto3Error | parsers.ResponseParserError):
        if isinstance(error, exceptions.ParamValidationError | exceptions.CredentialRetrievalError):
            return str(error), "see the variables AWS_*"
        return f"no proper answer ({type(error).__name__})", None
    return None, None
