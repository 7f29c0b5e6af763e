"""The published data sets, from small files of their form: what the official code makes of them, from every place."""

import gzip
import io
import os
import pickle
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import md5, sha256
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import _datasets, _imagefiles, _ray, _sources, prepare, schedule, train
from pipeline._params import Params, ParamsError
from pipeline._stage import StageError
from pipeline._store import store
from tests.pipeline.server import Server, serving

ROOT = Path(__file__).parent.parent.parent
Compose = Callable[..., Params]
Run = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.usefixtures("workdir")


@pytest.fixture
def run(compose_params: Compose, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Prepare a data set, some of its parameters changed; the manifest."""
    monkeypatch.delenv("NCSN_DATA", raising=False)

    def prepared(name: str, **changes: Any) -> dict[str, Any]:
        params = compose_params(f"data={name}")
        prepare.main(replace(params, data=replace(params.data, **changes)))
        return prepare.manifest()

    return prepared


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def publish(monkeypatch: pytest.MonkeyPatch, name: str, server: Server, *files: bytes) -> None:
    """Let the server have the files of a data set, with these contents."""
    sources = []
    for each, content in zip(_sources.PUBLISHED[name], files, strict=True):
        server.files[each.name] = content
        digest = f"sha256:{sha256(content).hexdigest()}"
        sources.append(replace(each, digest=digest, urls=(f"{server.url}{each.name}",)))
    monkeypatch.setitem(_sources.PUBLISHED, name, tuple(sources))


def arrays() -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in prepare.OUT.iterdir()}


def picture(rng: np.random.Generator, width: int, height: int, kind: str = "PNG") -> bytes:
    """A smooth picture with some noise, so that scaling and JPEG have something to do."""
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(small).astype(int) + rng.integers(-20, 21, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def official(content: bytes, *transforms: Any) -> np.ndarray:
    """What torchvision's transforms make of a picture, (C, H, W)."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    for transform in transforms:
        image = transform(image)
    return np.asarray(image).transpose(2, 0, 1)


@pytest.mark.parametrize("side", [8, 31])
def test_scaling_and_cropping_are_torchvisions(side: int) -> None:
    from torchvision.transforms import CenterCrop, Resize

    rng = np.random.default_rng(0)
    for width, height in [(8, 8), (9, 8), (31, 64), (47, 33), (33, 47), (100, 31), (178, 218), (63, 255)]:
        content = picture(rng, width, height)
        found = _imagefiles.decode(content, side, 3, None)
        assert (found == official(content, Resize(side), CenterCrop(side))).all(), (width, height)
        if min(width, height) >= 30:
            found = _imagefiles.decode(content, side, 3, 29)
            assert (found == official(content, CenterCrop(29), Resize(side))).all(), (width, height)


# MNIST


def idx(array: np.ndarray) -> bytes:
    head = bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(head + array.tobytes(), mtime=0)


@pytest.mark.parametrize("cache", ["data", "elsewhere"])
def test_mnist_is_downloaded_once(
    run: Run, server: Server, monkeypatch: pytest.MonkeyPatch, workdir: Path, cache: str
) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for n in (12, 5)]
    labels = [(np.arange(n) % 10).astype(np.uint8) for n in (12, 5)]
    publish(monkeypatch, "mnist", server, *(idx(each) for pair in zip(images, labels, strict=True) for each in pair))
    if cache != "data":
        monkeypatch.setenv("NCSN_DATA", str(workdir / cache))
    manifest = run("mnist")
    first = arrays()
    assert sorted(path.name for path in Path(cache, "mnist").iterdir()) == sorted(server.files)
    assert manifest["classes"] == list("0123456789")
    assert manifest["source"]["from"].startswith(server.url)  # not where it lies here
    assert (prepare.load("train")[0][:, 0] == images[0]).all()
    found = prepare.load("test")[1]
    assert found is not None
    assert (found == labels[1]).all()
    run("mnist")
    assert arrays() == first
    assert len(server.asked) == 4


# CIFAR-10


def batches(rng: np.random.Generator) -> dict[str, Any]:
    names = [name for name in _datasets.CIFAR10_BATCHES if name != "batches.meta"]
    found: dict[str, Any] = {
        name: {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": rng.integers(0, 10, 4).tolist()}
        for name in names
    }
    return found | {"batches.meta": {"label_names": [f"class {n}" for n in range(10)]}}


def packed(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in reversed(files.items()):
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def cifar10(server: Server, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Batches of four images, published; the pickles' content, and the pickles."""
    content = batches(np.random.default_rng(0))
    files = {name: pickle.dumps(each, protocol=2) for name, each in content.items()}
    monkeypatch.setattr(_datasets, "CIFAR10_BATCHES", {name: md5(each).hexdigest() for name, each in files.items()})
    publish(monkeypatch, "cifar10", server, packed(files))
    return content, files


def test_cifar10_is_the_same_from_everywhere(
    run: Run, cifar10: tuple[dict[str, Any], dict[str, bytes]], server: Server, workdir: Path
) -> None:
    content, files = cifar10
    manifest = run("cifar10")
    assert manifest["shape"] == [3, 32, 32]
    assert manifest["classes"] == content["batches.meta"]["label_names"]
    train, labels = prepare.load("train")
    assert labels is not None
    for number in range(5):
        batch, rows = content[f"data_batch_{number + 1}"], slice(4 * number, 4 * number + 4)
        assert (train[rows].reshape(4, -1) == batch["data"]).all()
        assert labels[rows].tolist() == batch["labels"]
    assert (prepare.load("test")[0].reshape(4, -1) == content["test_batch"]["data"]).all()
    first = arrays()
    own = workdir / "own" / "cifar-10-batches-py"
    own.mkdir(parents=True)
    for name, each in files.items():
        (own / name).write_bytes(each)
    for root in ("data/cifar10", "data/cifar10/cifar-10-python.tar.gz", "own", str(own)):
        run("cifar10", root=root)
        assert arrays() == first, root
    assert len(server.asked) == 1


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


def test_a_cifar10_batch_that_is_not_the_published_one_is_not_opened(
    run: Run, cifar10: tuple[dict[str, Any], dict[str, bytes]], workdir: Path
) -> None:
    own = workdir / "own" / "cifar-10-batches-py"
    own.mkdir(parents=True)
    for name, each in cifar10[1].items():
        (own / name).write_bytes(each)
    (own / "data_batch_3").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(
        StageError, match=r"own/cifar-10-batches-py: data_batch_3 has md5 .*, expected .*: it is not the"
    ):
        run("cifar10", root="own")
    assert not Path("evil").exists()
    (own / "data_batch_3").unlink()
    with pytest.raises(StageError, match=r"cifar-10-batches-py lacks data_batch_3; remove it, to have it downloaded"):
        run("cifar10", root="own")


def test_a_truncated_archive_is_fetched_again(
    run: Run, cifar10: tuple[dict[str, Any], dict[str, bytes]], server: Server, workdir: Path
) -> None:
    path = workdir / "data" / "cifar10" / "cifar-10-python.tar.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(server.files[path.name][:-100])
    assert run("cifar10")["splits"]["train"]["n"] == 20
    server.files.clear()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StageError, match=r"cifar-10-python\.tar\.gz \(170,498,071 bytes, sha256:.*HTTP 404"):
        run("cifar10")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "celeba32",
            {"resolution": 64},
            r"data\.resolution=64: expected 32 or null with data=celeba32; only image_folder",
        ),
        ("celeba64", {"channels": 1}, r"data\.channels=1: expected 3 or null with data=celeba64"),
        ("cifar10", {"resolution": 64}, r"data\.resolution=64: expected 32 or null with data=cifar10"),
    ],
)
def test_published_sets_keep_their_size_which_is_said_before_the_download(
    run: Run, name: str, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sources, "download", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(ParamsError, match=message):
        run(name, **changes)


# CelebA


@pytest.fixture
def celeba(server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Twelve faces: ten to train with, one to validate with, one to test with, in the size of the real ones."""
    rng = np.random.default_rng(0)
    files = {f"{number:06}.jpg": picture(rng, 178, 218, "JPEG") for number in range(1, 13)}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in reversed(files.items()):
            archive.writestr(f"img_align_celeba/{name}", content)
    parts = "".join(f"{name} {max(0, number - 9)}\n" for number, name in enumerate(files))
    for name in ("celeba32", "celeba64"):
        publish(monkeypatch, name, server, file.getvalue(), parts.encode())
    return files


@pytest.mark.parametrize("side", [32, 64])
def test_celeba_is_what_the_official_transforms_make(
    run: Run, celeba: dict[str, bytes], workdir: Path, side: int
) -> None:
    from torchvision.transforms import CenterCrop, Resize

    manifest = run(f"celeba{side}")
    assert {split: each["n"] for split, each in manifest["splits"].items()} == {"train": 10, "test": 1}
    assert manifest["classes"] is None
    expected = [official(content, CenterCrop(140), Resize(side)) for content in celeba.values()]
    assert (prepare.load("train")[0] == expected[:10]).all()
    assert (prepare.load("test")[0] == expected[11:]).all()
    first = arrays()
    own = workdir / "own" / "img_align_celeba"
    own.mkdir(parents=True)
    for name, content in celeba.items():
        (own / name).write_bytes(content)
    (own.parent / "list_eval_partition.txt").write_bytes(Path("data/celeba/list_eval_partition.txt").read_bytes())
    run(f"celeba{side}", root="own")
    assert arrays() == first


def test_faces_that_are_missing_are_named(run: Run, celeba: dict[str, bytes], workdir: Path) -> None:
    run("celeba32")
    (workdir / "data" / "celeba" / "img_align_celeba").mkdir()
    with pytest.raises(StageError, match=r"11 of 11 images cannot be read, .*000001\.jpg: FileNotFoundError"):
        run("celeba32")


# LSUN


def database(folder: Path, records: dict[bytes, bytes]) -> bytes:
    """Write an LMDB; the content of its file."""
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 26) as written, written.begin(write=True) as transaction:
        for key, content in records.items():
            transaction.put(key, content)
    return (folder / "data.mdb").read_bytes()


@pytest.fixture
def lsun(server: Server, monkeypatch: pytest.MonkeyPatch, workdir: Path) -> dict[str, dict[bytes, bytes]]:
    rng = np.random.default_rng(0)
    sets, zips = {}, []
    for split, n in (("train", 7), ("val", 3)):
        keys = [rng.bytes(20).hex().encode() for _ in range(n)]
        sizes = rng.integers(96, 300, (n, 2)).tolist()
        sets[split] = {key: picture(rng, *size, "WEBP") for key, size in zip(keys, sizes, strict=True)}
        name = f"church_outdoor_{split}_lmdb"
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{name}/data.mdb", database(workdir / "made" / name, sets[split]))
            archive.writestr(f"{name}/lock.mdb", b"")
        zips.append(file.getvalue())
    publish(monkeypatch, "lsun_church96", server, *zips)
    return sets


def test_lsun_is_what_torchvision_reads(run: Run, lsun: dict[str, dict[bytes, bytes]], server: Server) -> None:
    from torchvision.datasets import LSUN
    from torchvision.transforms import CenterCrop, Compose, Resize

    manifest = run("lsun_church96")
    assert manifest["source"]["pictures"] == {"church_outdoor_train_lmdb": 7, "church_outdoor_val_lmdb": 3}
    transform = Compose([Resize(96), CenterCrop(96)])
    for split, part in (("train", "train"), ("test", "val")):
        theirs = LSUN("data/lsun", classes=[f"church_outdoor_{part}"], transform=transform)
        expected = [np.asarray(theirs[number][0]).transpose(2, 0, 1) for number in range(len(theirs))]
        theirs.dbs[0].env.close()
        assert (prepare.load(split)[0] == expected).all()
    first = arrays()
    for name in list(server.files):
        Path("data/lsun", name).unlink()  # the unpacked ones are enough
    for root in (None, "made"):
        run("lsun_church96", root=root)
        assert arrays() == first
    assert len(server.asked) == 2


def test_half_a_database_is_refused(run: Run, lsun: dict[str, dict[bytes, bytes]], workdir: Path) -> None:
    file = workdir / "made" / "church_outdoor_train_lmdb" / "data.mdb"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        StageError, match=r"church_outdoor_train_lmdb/data\.mdb has .* bytes, expected .*: unpack or copy"
    ):
        run("lsun_church96", root="made")
    file.write_bytes(b"no database")
    with pytest.raises(StageError, match=r"church_outdoor_train_lmdb is no LMDB: "):
        run("lsun_church96", root="made")


def test_another_number_of_pictures_is_told(
    run: Run, lsun: dict[str, dict[bytes, bytes]], caplog: pytest.LogCaptureFixture
) -> None:
    run("lsun_church96", root="made")
    assert "church_outdoor_train_lmdb holds 7 pictures, the published one 126,227" in caplog.text


# FFHQ


def test_ffhq_is_split_as_the_official_code_does(run: Run, workdir: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [picture(rng, 256, 256) for _ in range(30)]
    for number, content in enumerate(pictures):
        path = workdir / "folder" / f"{number // 20 * 20:05}" / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    keys = {f"256-{number:05}".encode(): content for number, content in enumerate(pictures)}
    database(workdir / "base", keys | {b"length": b"30", b"128-00000": picture(rng, 128, 128)})

    indices = list(range(30))  # from here on as in ermongroup/ncsnv2, datasets/__init__.py
    np.random.seed(2019)
    np.random.shuffle(indices)
    train, test = indices[: int(30 * 0.9)], indices[int(30 * 0.9) :]

    run("ffhq256", root="folder")
    for split, numbers in (("train", train), ("test", test)):
        assert (prepare.load(split)[0] == [official(pictures[number]) for number in sorted(numbers)]).all()
    first = arrays()
    run("ffhq256", root="base")
    assert arrays() == first


def test_ffhqs_thumbnails_are_too_small(run: Run, workdir: Path) -> None:
    (workdir / "thumbnails").mkdir()
    for number in range(3):
        (workdir / "thumbnails" / f"{number}.png").write_bytes(picture(np.random.default_rng(0), 128, 128))
    with pytest.raises(StageError, match=r"thumbnails: 3 of 3 images cannot be read, .*128x128 pixels, fewer than 256"):
        run("ffhq256", root="thumbnails")


# Any order, bounded memory


@pytest.mark.parametrize("dropped", [[], [0], [9], [3, 4, 7]])
def test_rows_are_written_in_any_order_and_closed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropped: list[int]
) -> None:
    monkeypatch.setattr(prepare, "BLOCK", 2 * 3 * 4 * 5)  # two images at a time
    images = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 5), dtype=np.uint8)
    kept = [row for row in range(10) if row not in dropped]
    with open(tmp_path / "a.npy", "w+b") as file:
        array = prepare._Array(file, 10, (3, 4, 5))
        for row in random.Random(0).sample(range(10), 10):
            array.write(row, images[row])
        for row in dropped:
            array.drop(row)
        digest = array.finish()
    np.save(tmp_path / "b.npy", images[kept])
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert digest == sha256(images[kept].tobytes()).hexdigest()


MEASURE = """
import resource, sys
from pathlib import Path
from dataclasses import replace
from pipeline import _params, prepare
params = _params.load(sys.argv[1])
data = _params.Data("lsun_bedroom128", sys.argv[2], None, None, 0.2, 0, 0.01, True, None)
import lmdb, matplotlib, requests  # whatever is imported on the way is no data
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prepare.main(replace(params, data=data))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_set(workdir: Path) -> None:
    """4,096 pictures of 128x128: 200 MB of pixels, in less than 64 MB of memory."""
    content = io.BytesIO()
    Image.new("RGB", (128, 128), (10, 20, 30)).save(content, "JPEG")
    database(workdir / "bedroom_train_lmdb", {f"{number:08}".encode(): content.getvalue() for number in range(4096)})
    database(workdir / "bedroom_val_lmdb", {b"0": content.getvalue()})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(ROOT / "params.yaml"), str(workdir)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=workdir,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    images = prepare.load("train")[0]
    assert images.nbytes > 200e6
    assert (images[[0, -1]].mean((0, 2, 3)).round() == [10, 20, 30]).all()
    assert int(done.stdout) * 1024 < 64e6


# Real colour pictures


ARCHIVE = ROOT.parent / "shared" / "data" / "cifar10_jpeg.tar.gz"


@pytest.mark.slow
@pytest.mark.skipif(
    not ARCHIVE.is_file(), reason=f"needs ../{ARCHIVE.relative_to(ROOT.parent)}, CIFAR-10 as JPEG files"
)
def test_ncsnv2_learns_from_cifar10(compose_params: Compose, workdir: Path) -> None:
    """CIFAR-10 (JPEG), all 60,000 pictures; a narrow network on few levels for a few steps, loss D / 2 for score 0."""
    params = compose_params(
        "experiment=ncsnv2_cifar10",
        "data=image_folder",
        f"data.root={ARCHIVE}",
        "data.resolution=32",
        "model.width=16",
        "noise.L=20",
        "noise.steps_per_level=1",
        "train.steps=40",
        "train.batch_size=16",
        "train.learning_rate=1e-3",
        "train.log_every=10",
        "train.save_every=40",
        "train.preview_every=40",
    )
    prepare.main(params)
    manifest = prepare.manifest()
    assert manifest["shape"] == [3, 32, 32]
    assert manifest["unreadable"] == []
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert manifest["classes"] == names
    for split, n in (("train", 5000), ("test", 1000)):
        assert manifest["splits"][split]["per_class"] == dict.fromkeys(names, n)
        images, labels = prepare.load(split)
        assert labels is not None
        assert len(images) == len(labels) == 10 * n

    levels = schedule.choose(params.noise, torch.from_numpy(np.array(prepare.load("train")[0][:100])) / 255)
    folder = store(str(workdir / "runs")) / "run"
    train.claim(folder, {})
    held_out = np.array(prepare.load("test")[0][:20])
    data = _ray.Shared(path=prepare.OUT.absolute() / "train.npy")
    job = train.Job(params, data, held_out, (3, 32, 32), levels, folder)
    train.fit(job, _ray.World())
    losses = train.start(job, _ray.World())[1][:, 1]
    assert len(losses) == 4
    assert losses.isfinite().all()
    assert losses[-1] < losses[0]
    assert losses[-1] < 3 * 32 * 32 / 2
