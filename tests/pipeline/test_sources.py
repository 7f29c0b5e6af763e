"""Published files: whole and checked, or one line that says which to put where."""

import gzip
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import _sources
from pipeline._params import Data, Params
from pipeline._sources import Source
from pipeline._stage import StageError
from tests.pipeline.server import Server, serving

CONTENT = np.random.default_rng(0).bytes(3 * _sources.CHUNK + 1234)
NOWHERE = "http://no-such-host.invalid/"  # a name that RFC 6761 keeps from resolving


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        running.files["a.bin"] = CONTENT
        yield running


def source(*urls: str, content: bytes = CONTENT, kind: str = "md5") -> Source:
    digest = f"{kind}:{hashlib.new(kind, content).hexdigest()}"
    return Source("a.bin", len(content), digest, tuple(f"{url}a.bin" for url in urls))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_a_file_is_downloaded_once(server: Server, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "new" / "a.bin"
    for _ in range(2):
        assert _sources.download(source(server.url, kind=kind), path) == path
    assert path.read_bytes() == CONTENT
    assert server.asked == [("a.bin", None)]
    assert names(path.parent) == ["a.bin"]


def test_the_first_digits_of_a_digest_will_do(server: Server, tmp_path: Path) -> None:
    short = replace(source(server.url, kind="sha256"), digest=f"sha256:{hashlib.sha256(CONTENT).hexdigest()[:8]}")
    _sources.download(short, tmp_path / "a.bin")
    with pytest.raises(StageError, match="sent something else"):
        _sources.download(replace(short, digest="sha256:00000000"), tmp_path / "b.bin")


def test_a_broken_connection_goes_on_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.cuts["a.bin"] = [1_000_000, 500_000]
    _sources.download(source(server.url), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.asked[0] == ("a.bin", None)
    starts = [int(wanted.removeprefix("bytes=").removesuffix("-")) for _, wanted in server.asked[1:] if wanted]
    assert len(starts) == 2
    assert 0 < starts[0] <= 1_000_000 < starts[1] <= 1_500_000


def test_the_same_command_goes_on_where_the_last_one_stopped(server: Server, tmp_path: Path) -> None:
    server.cuts["a.bin"] = [1_500_000, 0]
    with pytest.raises(StageError) as caught:
        _sources.download(source(server.url), tmp_path / "a.bin")
    assert "the connection was lost after 1.5 MB, from where the same command goes on" in str(caught.value)
    assert names(tmp_path) == [".a.bin.part"]
    _sources.download(source(server.url), tmp_path / "a.bin")
    assert server.asked[-1] == ("a.bin", "bytes=1500000-")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert names(tmp_path) == ["a.bin"]


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.deaf.add("a.bin")
    server.cuts["a.bin"] = [1_500_000]
    _sources.download(source(server.url), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "part", [b"garbage", CONTENT, CONTENT + b"more", b"x" * (len(CONTENT) + 1)], ids=["wrong", "whole", "more", "long"]
)
def test_whatever_an_earlier_run_left_ends_well(server: Server, tmp_path: Path, part: bytes) -> None:
    (tmp_path / ".a.bin.part").write_bytes(part)
    _sources.download(source(server.url), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert names(tmp_path) == ["a.bin"]
    assert len(server.asked) == (1 if part == CONTENT else 2)


@pytest.mark.parametrize("old", [CONTENT[:-1], b"", b"x" * len(CONTENT)], ids=["truncated", "empty", "other"])
def test_a_file_that_is_not_the_published_one_is_fetched_again(server: Server, tmp_path: Path, old: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(old)
    _sources.download(source(server.url), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_something_else_under_that_address_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"as it was")
    server.files["a.bin"] = b"<html>quota exceeded"
    with pytest.raises(StageError) as caught:
        _sources.download(source(server.url), tmp_path / "a.bin")
    digest = hashlib.md5(b"<html>quota exceeded").hexdigest()
    assert (
        f"127.0.0.1:{server.url.split(':')[2][:-1]}: sent something else, 20 bytes of no type with md5:{digest}"
        in str(caught.value)
    )
    assert (tmp_path / "a.bin").read_bytes() == b"as it was"
    assert names(tmp_path) == ["a.bin"]


def test_the_second_address_is_tried(server: Server, tmp_path: Path) -> None:
    _sources.download(source(NOWHERE, f"{server.url}no/", server.url), tmp_path / "a.bin")
    assert server.asked == [("no/a.bin", None), ("a.bin", None)]


def test_a_packed_file_stays_packed(server: Server, tmp_path: Path) -> None:
    server.files["a.bin"] = packed = gzip.compress(CONTENT)
    server.encoded.add("a.bin")
    _sources.download(source(server.url, content=packed), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == packed


def test_without_network_one_line_says_what_to_put_where(server: Server, tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        _sources.download(source(NOWHERE, f"{server.url}no/"), tmp_path / "a.bin", ", or else")
    text = str(caught.value)
    assert text.startswith(f"a.bin (3,146,962 bytes, md5:{hashlib.md5(CONTENT).hexdigest()}) cannot be downloaded, ")
    assert "no-such-host.invalid: no connection; 127.0.0.1:" in text
    assert ": HTTP 404 Not Found: " in text
    assert text.endswith(f"put {NOWHERE}a.bin at {tmp_path}/a.bin, or else")
    assert "\n" not in text


def test_a_place_that_cannot_be_written_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StageError, match=r"file/a\.bin cannot be written: (File exists|Not a directory)"):
        _sources.download(source(server.url), tmp_path / "file" / "a.bin")


# Data sets


def test_the_table_is_torchvisions() -> None:
    from torchvision.datasets import CIFAR10, MNIST, CelebA, FashionMNIST

    for name, kind in (("mnist", MNIST), ("fashion_mnist", FashionMNIST)):
        files = [(each.name, each.digest.removeprefix("md5:")) for each in _sources.PUBLISHED[name]]
        assert files == kind.resources
        for each in _sources.PUBLISHED[name]:
            assert list(each.urls) == [f"{mirror}{each.name}" for mirror in kind.mirrors]
    (cifar10,) = _sources.PUBLISHED["cifar10"]
    assert (cifar10.name, cifar10.digest, cifar10.urls) == (CIFAR10.filename, f"md5:{CIFAR10.tgz_md5}", (CIFAR10.url,))
    assert cifar10.instead == CIFAR10.base_folder
    known = {name: (file, md5) for file, md5, name in CelebA.file_list}
    for each in _sources.PUBLISHED["celeba64"]:
        file, md5 = known[each.name]
        assert each.digest == f"md5:{md5}"
        assert f"?id={file}&" in each.urls[0]


@pytest.fixture
def data(compose_params: Callable[..., Params]) -> Callable[..., Data]:
    def make(name: str, root: Path | None = None) -> Data:
        given = ("data.root=x", "data.resolution=8") if name == "image_folder" else ()
        return replace(compose_params(f"data={name}", *given).data, root=None if root is None else str(root))

    return make


def test_files_lie_in_the_root_or_else_in_the_cache(
    data: Callable[..., Data], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NCSN_DATA", raising=False)
    assert _sources.folder(data("cifar10")) == Path("data/cifar10")
    assert _sources.folder(data("celeba32")) == _sources.folder(data("celeba64")) == Path("data/celeba")
    assert _sources.folder(data("lsun_tower128")) == Path("data/lsun")
    monkeypatch.setenv("NCSN_DATA", "/cache")
    assert _sources.folder(data("cifar10")) == Path("/cache/cifar10")
    assert _sources.folder(data("cifar10", workdir)) == workdir
    for part in ("cifar-10-python.tar.gz", "cifar-10-batches-py"):
        (workdir / part).mkdir()
        assert _sources.folder(data("cifar10", workdir / part)) == workdir
    with pytest.raises(
        StageError, match=r"data\.root=/no/such does not exist: expected the folder that holds, or is to"
    ):
        _sources.fetch(data("cifar10", Path("/no/such")))


def test_debians_fashion_mnist_stands_in_for_the_download(
    data: Callable[..., Data], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in _sources.PUBLISHED["fashion_mnist"]:
        (workdir / each.name).write_bytes(b"")
    monkeypatch.setattr(_sources, "DEBIAN_FASHION_MNIST", workdir)
    assert [path.parent for path in _sources.fetch(data("fashion_mnist"))] == [workdir] * 4
    monkeypatch.setattr(_sources, "DEBIAN_FASHION_MNIST", workdir / "none")
    assert _sources.folder(data("fashion_mnist")).name == "fashion_mnist"


def test_all_that_is_missing_is_named(
    data: Callable[..., Data], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tuple(replace(each, urls=(f"{NOWHERE}{each.name}",)) for each in _sources.PUBLISHED["mnist"])
    monkeypatch.setitem(_sources.PUBLISHED, "mnist", files)
    (workdir / "train-labels-idx1-ubyte").write_bytes(b"unpacked")
    with pytest.raises(StageError) as caught:
        _sources.fetch(data("mnist", workdir))
    text = str(caught.value)
    assert text.startswith(
        "train-images-idx3-ubyte.gz (9,912,422 bytes, md5:f68b3c2dcbeaaa9fbdd348bbdeb94873) cannot be"
    )
    assert f"at {workdir}/train-images-idx3-ubyte.gz, or name the folder that holds it with data.root=...; also" in text
    assert "train-labels" not in text
    assert f"also missing there: {files[2]} from {NOWHERE}{files[2].name}, {files[3]} from" in text
    assert "\n" not in text


def test_what_people_must_bring_is_named(data: Callable[..., Data], workdir: Path) -> None:
    with pytest.raises(StageError, match=r"data/ffhq256 does not exist: put FFHQ's 70,000 pictures there, 256x256 or"):
        _sources.fetch(data("ffhq256"))
    with pytest.raises(StageError, match=r"data\.root=/no does not exist: expected a folder or a \.tar"):
        _sources.fetch(data("image_folder", Path("/no")))
    assert _sources.fetch(data("image_folder", workdir)) == [workdir]
    assert _sources.fetch(data("digits")) == []
