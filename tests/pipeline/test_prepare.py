import gzip
import hashlib
import struct
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from pipeline import _datasets, _sources, prepare
from pipeline._params import Params, ParamsError
from pipeline._stage import StageError

FASHION_MNIST = _sources.PUBLISHED["fashion_mnist"]
Compose = Callable[..., Params]
pytestmark = pytest.mark.usefixtures("workdir")


@pytest.fixture
def prepared(compose_params: Compose) -> Callable[..., dict[str, Any]]:
    """Run the stage on a data set, with some of its parameters changed, and return the manifest."""
    given = {"image_folder": ("data.root=/no/such", "data.resolution=8")}

    def run(name: str = "digits", **changes: Any) -> dict[str, Any]:
        params = compose_params(f"data={name}", *given.get(name, ()))
        prepare.main(replace(params, data=replace(params.data, **changes)))
        return prepare.manifest()

    return run


Prepared = Callable[..., dict[str, Any]]


def folder(prepared: Prepared, root: Path | str, **changes: Any) -> dict[str, Any]:
    """Prepare a folder or archive of images at 8x8 RGB."""
    return prepared("image_folder", root=str(root), **changes)


def save(path: Path, image: Image.Image, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def noise(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def noise_folder(root: Path, paths: list[str]) -> Path:
    rng = np.random.default_rng(0)
    for path in paths:
        save(root / path, noise(rng, 9, 9))
    return root


def tar_of(folder: Path, archive: Path, *, prefix: str) -> Path:
    """Pack the files of a folder in reverse order, as no sorted listing would."""
    with tarfile.open(archive, "w:gz" if archive.name.endswith("gz") else "w") as tar:
        for file in sorted(folder.rglob("*"), reverse=True):
            tar.add(file, f"{prefix}{file.relative_to(folder)}", recursive=False)
    return archive


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# digits


def test_digits_are_split_by_class(prepared: Prepared) -> None:
    manifest = prepared()
    splits = manifest["splits"]
    assert manifest["name"] == "digits"
    assert manifest["shape"] == [1, 8, 8]
    assert manifest["classes"] == list("0123456789")
    assert manifest["unreadable"] == []
    assert splits["train"]["n"] + splits["test"]["n"] == 1797
    assert splits["test"]["n"] == pytest.approx(0.2 * 1797, abs=5)
    target = load_digits().target
    for name in manifest["classes"]:
        test, train = (splits[split]["per_class"][name] for split in ("test", "train"))
        assert test + train == np.sum(target == int(name))
        assert test == pytest.approx(0.2 * (test + train), abs=0.5)


def test_digits_are_scaled_to_bytes(prepared: Prepared) -> None:
    prepared()
    (train, train_labels), (test, test_labels) = prepare.load("train"), prepare.load("test")
    assert train.dtype == np.uint8
    assert train_labels is not None
    assert train_labels.dtype == np.int64
    assert test_labels is not None
    bunch = load_digits()
    scaled = np.array([0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255], np.uint8)
    expected = zip(scaled[bunch.images.astype(int)], bunch.target, strict=True)
    got = zip([*train, *test], [*train_labels, *test_labels], strict=True)
    assert Counter((image.tobytes(), label) for image, label in got) == Counter(
        (image.tobytes(), label) for image, label in expected
    )


def test_manifest_hashes_are_of_the_arrays(prepared: Prepared) -> None:
    manifest = prepared()
    for split in ("train", "test"):
        images, labels = prepare.load(split)
        assert labels is not None
        entry = manifest["splits"][split]
        assert entry["n"] == len(images) == len(labels)
        assert entry["sha256"] == hashlib.sha256(images.tobytes()).hexdigest()
        assert entry["labels_sha256"] == hashlib.sha256(labels.tobytes()).hexdigest()


def test_images_are_memory_mapped(prepared: Prepared) -> None:
    prepared()
    assert isinstance(prepare.load("train")[0], np.memmap)


def test_same_seed_same_bytes_other_seed_other_split(prepared: Prepared) -> None:
    prepared()
    first = contents(prepare.OUT)
    prepared()
    assert contents(prepare.OUT) == first
    prepared(seed=1)
    assert contents(prepare.OUT)["train.npy"] != first["train.npy"]


def test_draw_split_is_a_partition() -> None:
    groups = np.random.default_rng(0).integers(0, 5, 200)
    splits = _datasets.draw_split(groups, 0.25, 7)
    assert sorted([*splits["train"], *splits["test"]]) == list(range(200))
    for rows in splits.values():
        assert set(groups[rows]) == set(range(5))


@pytest.mark.parametrize("fraction", [1e-6, 1 - 1e-6])
def test_draw_split_keeps_every_class_in_both(fraction: float) -> None:
    splits = _datasets.draw_split(np.array([0, 0, 1, 1, 2]), fraction, 0)
    groups = {split: {int(row) // 2 for row in rows} for split, rows in splits.items()}
    assert groups == {"train": {0, 1, 2}, "test": {0, 1}}


def test_examples_is_an_enlarged_grid(prepared: Prepared) -> None:
    prepared()
    with Image.open(prepare.OUT / "examples.png") as picture:
        assert picture.size == (400, 400)
        tile = np.asarray(picture)[:40, :40]
    assert (tile == np.kron(prepare.load("train")[0][0, 0], np.ones((5, 5), np.uint8))).all()


def test_load_before_prepare_says_what_to_run() -> None:
    with pytest.raises(StageError, match=r"out/data/train\.npy does not exist: write it with `dvc repro prepare`"):
        prepare.load("train")
    with pytest.raises(StageError, match=r"manifest\.json does not exist"):
        prepare.manifest()


def test_a_labelled_set_leaves_no_labels_to_the_next(prepared: Prepared) -> None:
    prepared()
    prepared("patches")
    assert prepare.load("train")[1] is None


# parameters


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("digits", {"resolution": 16}, r"data\.resolution=16: expected 8 or null with data=digits; only image_folder"),
        ("digits", {"channels": 3}, r"data\.channels=3: expected 1 or null with data=digits; only image_folder takes"),
        ("digits", {"root": "/x"}, r"data\.root='/x': expected null with data=digits.*data=image_folder takes"),
        ("patches", {"channels": 1}, r"data\.channels=1: expected 3 or null with data=patches"),
        ("patches", {"resolution": 321}, r"data\.resolution=321: expected a whole number from 2 to 320"),
        ("patches", {"resolution": None}, r"data\.resolution=null: expected a whole number from 2 to 320"),
        ("image_folder", {"resolution": None}, r"data\.resolution=null: expected a whole number >= 2"),
        ("image_folder", {"channels": None}, r"data\.channels=null: expected 1 or 3"),
    ],
)
def test_impossible_parameters(prepared: Prepared, name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        prepared(name, **changes)
    assert not prepare.OUT.exists()


def test_own_shape_may_be_given(prepared: Prepared) -> None:
    assert prepared(resolution=8, channels=1)["shape"] == [1, 8, 8]


# Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(root: Path, replaced: dict[str, bytes] | None = None, *, pack: bool = False) -> dict[str, np.ndarray]:
    """Write the four files; `replaced` gives the content of some."""
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (12, 4, 4), dtype=np.uint8),
        "train-labels-idx1-ubyte": (np.arange(12) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (5, 4, 4), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(5, dtype=np.uint8),
    }
    for name, array in arrays.items():
        content = (replaced or {}).get(name.split("-idx")[0], idx(array))
        if pack:
            (root / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (root / name).write_bytes(content)
    return arrays


@pytest.mark.parametrize("pack", [False, True])
def test_idx_round_trip(prepared: Prepared, workdir: Path, pack: bool) -> None:
    arrays = write_idx(workdir, pack=pack)
    manifest = prepared("fashion_mnist", root=str(workdir), resolution=4)
    assert manifest["shape"] == [1, 4, 4]
    assert manifest["splits"]["train"]["per_class"]["Trouser"] == 2
    assert manifest["splits"]["test"]["per_class"]["Ankle boot"] == 0
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = prepare.load(split)
        assert (images[:, 0] == arrays[f"{prefix}-images-idx3-ubyte"]).all()
        assert labels is not None
        assert (labels == arrays[f"{prefix}-labels-idx1-ubyte"]).all()


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (
            {"train-images": b"\x00\x00\x0d\x03" + bytes(12)},
            r"train-images-idx3-ubyte starts with 00000d03: expected 00000803",
        ),
        (
            {"t10k-labels": b"\x00\x00\x08\x03" + bytes(12)},
            r"t10k-labels-idx1-ubyte starts with 00000803: expected 00000801",
        ),
        ({"train-images": b""}, r"starts with nothing"),
        ({"train-images": b"\x00\x00\x08\x03\x00"}, r"ends after 5 bytes, within its header of 16"),
        ({"train-images": idx(np.zeros((12, 4, 4), np.uint8))[:-1]}, r"holds 191 values: expected 12 x 4 x 4"),
        ({"train-images": struct.pack(">4B3I", 0, 0, 8, 3, 2**31, 2**31, 4)}, r"holds 0 values: expected 2147483648 x"),
        ({"train-images": idx(np.zeros((0, 4, 4), np.uint8))}, r"holds 0 values: expected 0 x 4 x 4, more than none"),
        ({"train-labels": idx(np.zeros(3, np.uint8))}, r"12 train images but 3 labels"),
        ({"t10k-labels": idx(np.full(5, 10, np.uint8))}, r"label 10, expected 0 to 9"),
        ({"t10k-images": idx(np.zeros((5, 4, 5), np.uint8))}, r"train images are \(4, 4\), test images \(4, 5\)"),
    ],
)
def test_broken_idx(prepared: Prepared, workdir: Path, replaced: dict[str, bytes], message: str) -> None:
    write_idx(workdir, replaced)
    with pytest.raises(StageError, match=message):
        prepared("fashion_mnist", root=str(workdir))


def test_broken_gzip(prepared: Prepared, workdir: Path) -> None:
    write_idx(workdir, pack=True)
    path = workdir / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StageError, match=r"train-images-idx3-ubyte\.gz is not a whole gzip file"):
        prepared("fashion_mnist", root=str(workdir))


def test_missing_fashion_mnist_names_path_and_fix(
    prepared: Prepared, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tuple(replace(each, urls=(f"http://no-such-host.invalid/{each.name}",)) for each in FASHION_MNIST)
    monkeypatch.setitem(_sources.PUBLISHED, "fashion_mnist", files)
    with pytest.raises(StageError) as caught:
        prepared("fashion_mnist", root=str(workdir))
    assert f"at {workdir}/train-images-idx3-ubyte.gz, `apt-get install dataset-fashion-mnist`, or name the" in str(
        caught.value
    )
    with pytest.raises(StageError, match=r"data\.root=/no/such does not exist: expected the folder that holds"):
        prepared("fashion_mnist", root="/no/such")


def test_fashion_mnist_keeps_its_own_size(prepared: Prepared, workdir: Path) -> None:
    write_idx(workdir)
    with pytest.raises(ParamsError, match=r"data\.resolution=32: expected 4 or null with data=fashion_mnist"):
        prepared("fashion_mnist", root=str(workdir), resolution=32)


# Folders and archives of images


@pytest.fixture
def mixed(workdir: Path) -> Path:
    """40 images of every colour type and many sizes and formats, some nested, with files to pass over."""
    rng = np.random.default_rng(0)
    root = workdir / "mixed"
    kinds = [("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("P", "gif"), ("LA", "png"), ("RGB", "bmp")]
    kinds += [("RGB", "WEBP"), ("CMYK", "tiff"), ("1", "png"), ("I;16", "png")]
    for number in range(40):
        mode, suffix = kinds[number % len(kinds)]
        image = noise(rng, *rng.integers(5, 40, 2))
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        save(root / ("deep" if number % 3 else ".") / f"{number:02}.{suffix}", image.convert(mode))
    for passed_over in ("notes.txt", ".hidden.png", "__MACOSX/00.png", ".cache/x.jpg"):
        path = root / passed_over
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    return root


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_and_archive_give_the_same(prepared: Prepared, mixed: Path, workdir: Path, channels: int) -> None:
    manifest = folder(prepared, mixed, channels=channels)
    assert manifest["shape"] == [channels, 8, 8]
    assert manifest["classes"] is None
    assert manifest["unreadable"] == []
    assert {split: entry["n"] for split, entry in manifest["splits"].items()} == {"train": 32, "test": 8}
    assert prepare.load("train")[1] is None
    archives = {"a.tar.gz": "", "b.tgz": "mixed/", "c.tar": "./"}
    for name, prefix in archives.items():
        archive = tar_of(mixed, workdir / name, prefix=prefix)
        again = folder(prepared, archive, channels=channels)
        assert again["splits"] == manifest["splits"]


def only_image(prepared: Prepared, root: Path, **changes: Any) -> np.ndarray:
    """The prepared image of a folder that holds several copies of it; (C, H, W)."""
    folder(prepared, root, **changes)
    train, test = prepare.load("train")[0], prepare.load("test")[0]
    assert (train[0] == test[0]).all()
    return np.asarray(train[0])


def save_twice(root: Path, image: Image.Image, suffix: str = ".png", **options: Any) -> None:
    for name in "ab":
        save(root / f"{name}{suffix}", image, **options)


def test_transparent_is_white(prepared: Prepared, workdir: Path) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = (200, 0, 0, 255)
    pixels[:4, 4:] = (0, 0, 0, 128)
    save_twice(workdir / "rgba", Image.fromarray(pixels))
    image = only_image(prepared, workdir / "rgba")
    assert (image[:, :, :4] == np.array([200, 0, 0])[:, None, None]).all()
    assert (image[:, 4:, 4:] == 255).all()
    assert (image[:, :4, 4:] == 127).all()


def test_transparent_palette_is_white(prepared: Prepared, workdir: Path) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    save_twice(workdir / "palette", image, transparency=0)
    assert (only_image(prepared, workdir / "palette") == 255).all()


def test_16_bit_grey_is_scaled_not_clipped(prepared: Prepared, workdir: Path) -> None:
    save_twice(workdir / "deep", Image.fromarray(np.full((8, 8), 128 * 256, np.uint16)))
    assert (only_image(prepared, workdir / "deep") == 128).all()


def test_exif_orientation_is_applied(prepared: Prepared, workdir: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise to show
    save_twice(workdir / "turned", Image.fromarray(pixels), ".jpg", exif=exif, quality=95)
    image = only_image(prepared, workdir / "turned")
    assert (image[:, :, 4:] > 250).all()
    assert (image[:, :, :4] < 5).all()


@pytest.mark.parametrize("size", [(48, 16), (16, 48)])
def test_shortest_side_is_scaled_and_the_centre_cropped(
    prepared: Prepared, workdir: Path, size: tuple[int, int]
) -> None:
    """Thirds of 0, 100 and 250: the middle third is what the crop of a 3:1 image keeps."""
    thirds = np.repeat(np.array([0, 100, 250], np.uint8), 16)
    pixels = np.broadcast_to(thirds if size[0] > size[1] else thirds[:, None], size[::-1])
    save_twice(workdir / "wide", Image.fromarray(np.ascontiguousarray(pixels)))
    image = only_image(prepared, workdir / "wide")
    assert (image[:, 1:-1, 1:-1] == 100).all()


def test_the_crop_comes_before_the_scaling(prepared: Prepared, workdir: Path) -> None:
    """A frame of 250 around 24 pixels of 100; the crop keeps 20 of them."""
    pixels = np.full((40, 48), 250, np.uint8)
    pixels[8:32, 12:36] = 100
    save_twice(workdir / "framed", Image.fromarray(pixels))
    assert (only_image(prepared, workdir / "framed", crop=20) == 100).all()
    assert (only_image(prepared, workdir / "framed", crop=40)[:, 0] == 250).all()
    with pytest.raises(StageError, match=r"48x40 pixels, fewer than data.crop=41"):
        only_image(prepared, workdir / "framed", crop=41)


def test_shrinking_is_antialiased(prepared: Prepared, workdir: Path) -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    save_twice(workdir / "board", Image.fromarray(board))
    image = only_image(prepared, workdir / "board").astype(int)
    assert np.abs(image - 127.5).max() < 3


def test_small_images_are_enlarged(prepared: Prepared, workdir: Path) -> None:
    save_twice(workdir / "dot", Image.new("RGB", (1, 1), (1, 2, 3)))
    assert (only_image(prepared, workdir / "dot") == np.array([1, 2, 3])[:, None, None]).all()


BROKEN = [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(40)]


@pytest.mark.parametrize("content", [*BROKEN, None], ids=["empty", "text", "header", "truncated"])
@pytest.mark.parametrize("archive", [False, True])
def test_one_unreadable_of_120_is_listed(
    prepared: Prepared, workdir: Path, content: bytes | None, archive: bool
) -> None:
    root = noise_folder(workdir / "set", [f"{number:03}.png" for number in range(120)])
    broken = root / "050.png"
    broken.write_bytes(broken.read_bytes()[:-60] if content is None else content)
    manifest = folder(prepared, tar_of(root, workdir / "set.tar", prefix="") if archive else root)
    assert [entry["path"] for entry in manifest["unreadable"]] == ["050.png"]
    assert "Error: " in manifest["unreadable"][0]["error"]
    assert " at 0x" not in manifest["unreadable"][0]["error"]
    assert sum(entry["n"] for entry in manifest["splits"].values()) == 119
    assert all(image.any() for split in ("train", "test") for image in prepare.load(split)[0])


def test_unreadable_image_keeps_labels_aligned(prepared: Prepared, workdir: Path) -> None:
    root = workdir / "set"
    for number in range(120):
        label = number % 3
        save(root / f"class{label}" / f"{number:03}.png", Image.new("RGB", (8, 8), (label, 0, 0)))
    (root / "class1" / "001.png").write_bytes(b"")
    folder(prepared, root)
    for split in ("train", "test"):
        images, labels = prepare.load(split)
        assert labels is not None
        assert (images[:, 0, 0, 0] == labels).all()


def test_more_than_one_percent_unreadable_is_an_error(prepared: Prepared, workdir: Path) -> None:
    root = noise_folder(workdir / "set", [f"{number:03}.png" for number in range(120)])
    for number in (7, 50):
        (root / f"{number:03}.png").write_bytes(b"")
    with pytest.raises(
        StageError, match=r"2 of 120 images cannot be read, more than 1%; the first: 007\.png: .*050\.png: "
    ):
        folder(prepared, root)
    assert not prepare.OUT.exists()


def test_link_inside_an_archive_is_unreadable(prepared: Prepared, workdir: Path) -> None:
    root = noise_folder(workdir / "set", [f"{number:03}.png" for number in range(120)])
    (root / "link.png").symlink_to("/etc/passwd")
    manifest = folder(prepared, tar_of(root, workdir / "set.tar", prefix=""))
    assert [entry["path"] for entry in manifest["unreadable"]] == ["link.png"]


def test_archive_writes_nothing_outside(prepared: Prepared, workdir: Path) -> None:
    root = noise_folder(workdir / "set", ["a.png", "b.png"])
    archive = tar_of(root, workdir / "set.tar", prefix=f"{workdir}/escaped/")
    folder(prepared, archive)
    assert sorted(path.name for path in workdir.iterdir()) == ["out", "set", "set.tar"]


def test_truncated_archive_is_an_error(prepared: Prepared, workdir: Path) -> None:
    root = noise_folder(workdir / "set", [f"{number:03}.png" for number in range(20)])
    archive = tar_of(root, workdir / "set.tgz", prefix="")
    archive.write_bytes(archive.read_bytes()[:-600])
    with pytest.raises(
        StageError, match=r"set\.tgz cannot be read: .*expected a folder or a whole \.tar, \.tar\.gz or \.tgz"
    ):
        folder(prepared, archive)


def test_a_root_that_is_no_archive(prepared: Prepared, workdir: Path) -> None:
    (workdir / "a.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(StageError, match=r"a\.zip cannot be read: .*expected a folder or a whole \.tar"):
        folder(prepared, workdir / "a.zip")


def test_missing_empty_and_too_small_folders(prepared: Prepared, workdir: Path) -> None:
    with pytest.raises(StageError, match=r"data\.root=/no/such does not exist: expected a folder or a \.tar"):
        folder(prepared, "/no/such")
    root = workdir / "set"
    root.mkdir()
    (root / "notes.txt").write_text("no image")
    with pytest.raises(StageError, match=r"set holds no images: expected files ending in \.bmp, \.gif"):
        folder(prepared, root)
    noise_folder(root, ["one.png"])
    with pytest.raises(StageError, match=r"1 readable images give 1 to train on and 0 to test with: expected at least"):
        folder(prepared, root)


def test_folders_train_and_test_are_the_split(prepared: Prepared, workdir: Path) -> None:
    root = workdir / "set"
    for split, n in (("train", 4), ("test", 2)):
        for label, value in (("cat", 10), ("dog", 20)):
            for number in range(n):
                shade = Image.new("RGB", (8, 8), (value + number, n, 0))
                save(root / split / label / f"{number}.png", shade)
    manifest = folder(prepared, root)
    assert manifest["classes"] == ["cat", "dog"]
    assert manifest["splits"]["train"]["per_class"] == {"cat": 4, "dog": 4}
    assert manifest["splits"]["test"]["per_class"] == {"cat": 2, "dog": 2}
    images, labels = prepare.load("train")
    assert images[:, 0, 0, 0].tolist() == [10, 11, 12, 13, 20, 21, 22, 23]
    assert (images[:, 1] == 4).all()
    assert labels is not None
    assert labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    for prefix in ("", "cifar10/"):
        again = folder(prepared, tar_of(root, workdir / "set.tar.gz", prefix=prefix))
        assert again["splits"] == manifest["splits"]
        assert again["classes"] == manifest["classes"]


@pytest.mark.parametrize(
    ("paths", "sides", "labels"),
    [
        (["a.png", "b.png"], None, None),
        (["cat/a.png", "dog/b.png"], None, ["cat", "dog"]),
        (["cat/a.png", "cat/deep/b.png", "dog/c.png"], None, ["cat", "cat", "dog"]),
        (["cat/a.png", "b.png"], None, None),
        (["cat/a.png", "cat/b.png"], None, None),  # one class tells nothing
        (["faces/1/a.png", "faces/2/b.png"], None, ["1", "2"]),
        (["test/a.png", "train/b.png"], ["test", "train"], None),
        (["test/cat/a.png", "train/cat/b.png"], ["test", "train"], None),
        (["test/cat/a.png", "train/dog/b.png"], ["test", "train"], ["cat", "dog"]),
        (["test/a.png", "train/cat/b.png", "train/dog/c.png"], ["test", "train", "train"], None),
        (["x/y/test/a.png", "x/y/train/b.png"], ["test", "train"], None),
        (["train/cat/a.png", "train/dog/b.png"], None, ["cat", "dog"]),  # no test/: the split is to be drawn
        (["plane/a.png", "train/b.png"], None, ["plane", "train"]),  # a train is a class, too
    ],
)
def test_layout(paths: list[str], sides: list[str] | None, labels: list[str] | None) -> None:
    assert _datasets.layout(paths) == (sides, labels)


def test_images_beside_train_and_test_are_an_error() -> None:
    with pytest.raises(StageError, match=r"1 images lie beside the folders train and test, the first is val/c\.png"):
        _datasets.layout(["test/a.png", "train/b.png", "val/c.png"])


# Patches


def test_patches(prepared: Prepared) -> None:
    manifest = prepared("patches", resolution=64)
    assert manifest["shape"] == [3, 64, 64]
    assert manifest["classes"] is None
    train, labels = prepare.load("train")
    assert labels is None
    assert train.shape == (manifest["splits"]["train"]["n"], 3, 64, 64)
    credited = {photo["file"]: photo["attribution"] for photo in manifest["source"]["photographs"]}
    assert credited.keys() == {"china.jpg", "flower.jpg"}
    assert "danielbuechele" in credited["china.jpg"]
    assert "vultilion" in credited["flower.jpg"]
    photographs = load_sample_images().images
    assert (train[0].transpose(1, 2, 0) == photographs[0][:64, :64]).all()
    last = prepare.load("test")[0][-1].transpose(1, 2, 0)
    top, left = _datasets.patch_corners(427, 640, 64, 0.2)["test"][-1]
    assert (last == photographs[1][top : top + 64, left : left + 64]).all()


@pytest.mark.parametrize("side", [2, 7, 32, 45])
@pytest.mark.parametrize("test_fraction", [0.001, 0.2, 0.5, 0.999])
def test_no_pixel_is_in_both_splits(side: int, test_fraction: float) -> None:
    covered = {}
    for split, corners in _datasets.patch_corners(61, 90, side, test_fraction).items():
        covered[split] = np.zeros((61, 90), bool)
        assert corners
        assert len(set(corners)) == len(corners)
        for top, left in corners:
            assert 0 <= top <= 61 - side
            assert 0 <= left <= 90 - side
            covered[split][top : top + side, left : left + side] = True
    assert not (covered["train"] & covered["test"]).any()


def test_patches_overlap_by_half() -> None:
    corners = _datasets.patch_corners(427, 640, 32, 0.2)
    assert corners["train"][:2] == [(0, 0), (0, 16)]
    assert min(left for _, left in corners["test"]) == 512
    assert max(left for _, left in corners["train"]) == 480
