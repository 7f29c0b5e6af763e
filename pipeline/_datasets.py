"""What each data set is: its files, its images in their order, its split, its labels, where it comes from."""

import gzip
import hashlib
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import _imagefiles, _sources
from pipeline._imagefiles import File, Images, Numbered
from pipeline._params import Data, ParamsError
from pipeline._stage import StageError, log
from pipeline._store import replacing_folder

SPLITS = ("train", "test")
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
CIFAR10_BATCHES = {  # MD5 of the files inside the archive: they are pickles, and opened only if they are these
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
CELEBA_SPLITS = {"0": "train", "2": "test"}  # 1 is the validation set, which the official code leaves out, too
SIDES = {
    "cifar10": 32,
    "celeba32": 32,
    "celeba64": 64,
    "lsun_church96": 96,
    "lsun_bedroom128": 128,
    "lsun_tower128": 128,
    "ffhq256": 256,
}
PICTURES = {  # how many were published
    "church_outdoor_train_lmdb": 126_227,
    "bedroom_train_lmdb": 3_033_042,
    "tower_train_lmdb": 708_264,
    "ffhq256": 70_000,
} | dict.fromkeys(("church_outdoor_val_lmdb", "bedroom_val_lmdb", "tower_val_lmdb"), 300)
MNIST = "LeCun, Bottou, Bengio & Haffner (1998), Gradient-Based Learning Applied to Document Recognition"
FASHION_MNIST = "Xiao, Rasul & Vollgraf (2017), Fashion-MNIST, arXiv:1708.07747, MIT licence"
PHOTOGRAPHS = (  # as scikit-learn's sklearn/datasets/images/README.txt credits them
    {
        "file": "china.jpg",
        "attribution": "Some rights reserved by danielbuechele",
        "licence": "https://creativecommons.org/licenses/by/2.0/",
        "url": "https://www.flickr.com/photos/danielbuechele/6061409035/sizes/z/in/photostream/",
    },
    {
        "file": "flower.jpg",
        "attribution": "Some rights reserved by vultilion",
        "licence": "https://creativecommons.org/licenses/by/2.0/",
        "url": "https://www.flickr.com/photos/vultilion/6056698931/sizes/z/in/photostream/",
    },
)
Labels = NDArray[np.int64]
Rows = NDArray[np.intp]


@dataclass(frozen=True)
class ImageSet:
    """A data set whose images are numbered and come one after the other.

    Args:
        where: Where it lies, for messages.
        shape: (C, H, W).
        splits: Numbers of the images of "train" and of "test"; those in neither are left out.
        images: Numbers and images, uint8 (C, H, W), in any order; of a number that comes twice the last one counts.
        source: Where the images come from and how they were split, as JSON.
        labels: int64, by number, row numbers of `classes`; None if unlabelled.
        classes: Their names; None if unlabelled.
    """

    where: str
    shape: tuple[int, int, int]
    splits: dict[str, Rows]
    images: Iterator[Numbered]
    source: dict[str, Any]
    labels: Labels | None = None
    classes: list[str] | None = None


def find(data: Data) -> ImageSet:
    """The data set that `data` describes, its files fetched, its images not yet read.

    Raises:
        ParamsError: On a data.* value that the set cannot have.
        StageError: On missing or broken files.
    """
    build: dict[str, Callable[[Data], ImageSet]] = {
        "digits": _digits,
        "patches": _patches,
        "mnist": partial(_idx_set, classes=[str(digit) for digit in range(10)], reference=MNIST),
        "fashion_mnist": partial(_idx_set, classes=list(FASHION_CLASSES), reference=FASHION_MNIST),
        "cifar10": _cifar10,
        "celeba32": _celeba,
        "celeba64": _celeba,
        "ffhq256": _ffhq,
        "image_folder": _image_folder,
    }
    if data.name in SIDES:
        _expect_own_shape(data, 3, SIDES[data.name])  # before hours of downloading
    return build.get(data.name, _lsun)(data)


def _digits(data: Data) -> ImageSet:
    from sklearn.datasets import load_digits

    _expect_no_root(data)
    bunch = load_digits()
    images: Images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels: Labels = bunch.target.astype(np.int64)
    source = {
        "from": "scikit-learn's load_digits",
        "reference": "Alpaydin & Kaynak (1998), Optical Recognition of Handwritten Digits, UCI, doi:10.24432/C50P49",
        "split": _how_drawn(data),
    }
    splits = draw_split(labels, data.test_fraction, data.seed)
    return _of_array(data, images, splits, source, labels, [str(name) for name in bunch.target_names])


def _of_array(
    data: Data,
    images: Images,
    splits: dict[str, Rows],
    source: dict[str, Any],
    labels: Labels | None = None,
    classes: list[str] | None = None,
) -> ImageSet:
    """The set of an array (N, C, H, W)."""
    _, channels, height, width = images.shape
    _expect_own_shape(data, channels, height)
    return ImageSet(source["from"], (channels, height, width), splits, enumerate(images), source, labels, classes)


def _idx_set(data: Data, classes: list[str], reference: str) -> ImageSet:
    """MNIST and what has its form."""
    root = _sources.folder(data)
    images: list[Images] = []
    labels: list[Images] = []
    files = {}
    for number, path in enumerate(_sources.fetch(data)):  # images and labels to train with, then to test with
        content = path.read_bytes()
        files[path.name] = hashlib.sha256(content).hexdigest()
        (labels if number % 2 else images).append(_read_idx(path, content, ndim=1 if number % 2 else 3))
    for name, split_images, split_labels in zip(("train", "t10k"), images, labels, strict=True):
        if len(split_images) != len(split_labels):
            raise StageError(f"{root}: {len(split_images)} {name} images but {len(split_labels)} labels")
    if images[0].shape[1:] != images[1].shape[1:]:
        raise StageError(f"{root}: train images are {images[0].shape[1:]}, test images {images[1].shape[1:]}")
    joined = np.concatenate(labels).astype(np.int64)
    if joined.max() >= len(classes):
        raise StageError(f"{root}: label {joined.max()}, expected 0 to {len(classes) - 1}")
    rows = np.arange(len(joined))
    source = {
        "from": _named(data, root),
        "reference": reference,
        "split": "as the set comes",
        "files": files,
    }
    splits = {"train": rows[: len(images[0])], "test": rows[len(images[0]) :]}
    return _of_array(data, np.concatenate(images)[:, None], splits, source, joined, classes)


def _read_idx(path: Path, content: bytes, *, ndim: int) -> Images:
    """Decode an IDX file of unsigned bytes: 0, 0, type 8, ndim, one big-endian uint32 per dimension, then the values.

    Format: http://yann.lecun.com/exdb/mnist/, "THE IDX FILE FORMAT".

    Args:
        path: For messages; a name ending in .gz says that the content is compressed.
        content: The file's bytes.
        ndim: The number of dimensions to expect.

    Raises:
        StageError: If the content is anything else, empty or of another length than its header says.
    """
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise StageError(f"{path} is not a whole gzip file: {error}") from error
    expected = bytes((0, 0, 8, ndim))
    if content[:4] != expected:
        raise StageError(
            f"{path} starts with {content[:4].hex() or 'nothing'}: expected {expected.hex()}, "
            f"an IDX file of unsigned bytes in {ndim} dimension{'s' * (ndim > 1)}"
        )
    start = 4 + 4 * ndim
    if len(content) < start:
        raise StageError(f"{path} ends after {len(content)} bytes, within its header of {start}")
    shape = struct.unpack(f">{ndim}I", content[4:start])
    values = np.frombuffer(content, np.uint8, offset=start)
    if values.size != np.prod(shape, dtype=object) or not values.size:
        raise StageError(f"{path} holds {values.size} values: expected {' x '.join(map(str, shape))}, more than none")
    return values.reshape(shape)


def _cifar10(data: Data) -> ImageSet:
    (path,) = _sources.fetch(data)
    batches = {}
    for name, content in _cifar10_files(path):
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != CIFAR10_BATCHES[name]:
            raise StageError(
                f"{path}: {name} has md5 {found}, expected {CIFAR10_BATCHES[name]}: it is not the published file and "
                "is not opened; remove it, to have it downloaded"
            )
        batches[name] = pickle.loads(content, encoding="latin1")
    if missing := CIFAR10_BATCHES.keys() - batches.keys():
        raise StageError(f"{path} lacks {', '.join(sorted(missing))}; remove it, to have it downloaded")
    parts = [batches[name] for name in CIFAR10_BATCHES if name != "batches.meta"]
    images: Images = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
    labels: Labels = np.concatenate([part["labels"] for part in parts]).astype(np.int64)
    rows, n = np.arange(len(images)), len(images) - len(batches["test_batch"]["labels"])
    source = {
        "from": "https://www.cs.toronto.edu/~kriz/cifar.html",
        "reference": "Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images",
        "split": "as the set comes",
        "files": dict(CIFAR10_BATCHES),
    }
    splits = {"train": rows[:n], "test": rows[n:]}
    return _of_array(data, images, splits, source, labels, batches["batches.meta"]["label_names"])


def _cifar10_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the batches in the archive, or in its folder."""
    if path.is_dir():
        for name in CIFAR10_BATCHES:
            if (path / name).is_file():
                yield name, (path / name).read_bytes()
        return
    with tarfile.open(path) as archive:
        for member in archive:
            name = PurePosixPath(member.name).name
            if name in CIFAR10_BATCHES:
                yield name, _imagefiles.extract(archive, member)


def _celeba(data: Data) -> ImageSet:
    pictures, partition = _sources.fetch(data)
    lines = [line.split() for line in partition.read_text().splitlines() if line.strip()]
    numbers = {split: [n for n, line in enumerate(lines) if CELEBA_SPLITS.get(line[1]) == split] for split in SPLITS}
    names = [line[0] for line in lines]
    source = {
        "from": "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        "reference": "Liu, Luo, Wang & Tang (2015), Deep Learning Face Attributes in the Wild, arXiv:1411.7766",
        "split": "as the set comes, without its validation set",
        "crop": data.crop,
    }
    return _of_files(
        data,
        str(pictures),
        {split: np.array(rows, np.intp) for split, rows in numbers.items()},
        _celeba_files(pictures, names, sorted(numbers["train"] + numbers["test"])),
        source,
    )


def _celeba_files(pictures: Path, names: list[str], numbers: list[int]) -> Iterator[File]:
    """The pictures of these numbers, from the zip or from its folder."""
    if pictures.is_dir():
        for number in numbers:
            yield number, names[number], (pictures / names[number]).read_bytes
        return
    with zipfile.ZipFile(pictures) as archive:
        for number in numbers:
            yield number, names[number], partial(archive.read, f"img_align_celeba/{names[number]}")


def _lsun(data: Data) -> ImageSet:
    paths = [_unpacked(path) for path in _sources.fetch(data)]
    counts = []
    for path in paths:
        with _imagefiles.database(path) as database:
            counts.append(database.stat()["entries"])
        _expect_number(path, path.name, counts[-1])
    rows = np.arange(sum(counts))
    source = {
        "from": "https://www.yf.io/p/lsun",
        "reference": "Yu, Seff, Zhang, Song, Funkhouser & Xiao (2015), LSUN, arXiv:1506.03365",
        "split": "as the set comes: train, and val for test",
        "pictures": dict(zip((path.name for path in paths), counts, strict=True)),
    }
    splits = {"train": rows[: counts[0]], "test": rows[counts[0] :]}
    return _of_files(data, str(paths[0].parent), splits, _lsun_files(paths), source)


def _lsun_files(paths: list[Path]) -> Iterator[File]:
    """All pictures of the databases, in the order of their keys."""
    number = 0
    for path in paths:
        with _imagefiles.database(path) as database, database.begin() as transaction:
            for key, content in transaction.cursor():
                yield number, key.decode(errors="replace"), partial(bytes, content)
                number += 1


def _unpacked(path: Path) -> Path:
    """The folder of one of LSUN's databases, unpacked beside its zip if need be."""
    if path.suffix != ".zip":
        return path
    folder = path.with_suffix("")
    log.info("unpacking %s", path)
    with (
        replacing_folder(folder) as part,
        zipfile.ZipFile(path) as archive,
        archive.open(f"{folder.name}/data.mdb") as packed,
        open(part / "data.mdb", "wb") as file,
    ):
        shutil.copyfileobj(packed, file, 1 << 24)
    return folder


def _ffhq(data: Data) -> ImageSet:
    (root,) = _sources.fetch(data)
    if (root / "data.mdb").is_file():
        files, n = _ffhq_records(root)
    else:
        paths = _imagefiles.list_images(root)
        files, n = _imagefiles.stored(root, paths), len(paths)
    _expect_number(root, data.name, n)
    order = list(range(n))
    np.random.RandomState(data.seed).shuffle(order)  # as the official code: numpy's old generator, seed 2019
    cut = int(n * (1 - data.test_fraction))
    splits = {"train": np.sort(order[:cut]).astype(np.intp), "test": np.sort(order[cut:]).astype(np.intp)}
    source = {
        "from": _sources.FFHQ,
        "reference": "Karras, Laine & Aila (2019), A Style-Based Generator Architecture for GANs, arXiv:1812.04948",
        "split": _how_drawn(data),
        "pictures": n,
    }
    return _of_files(data, str(root), splits, files, source, least=SIDES[data.name])


def _ffhq_records(root: Path) -> tuple[Iterator[File], int]:
    """The pictures of an LMDB: all but the record "length"; if some have keys such as 256-00000, those."""
    with _imagefiles.database(root) as database, database.begin() as transaction:
        keys = [key for key in transaction.cursor().iternext(values=False) if key != b"length"]
    keys = [key for key in keys if key.startswith(b"256-")] or keys

    def files() -> Iterator[File]:
        with _imagefiles.database(root) as database, database.begin() as transaction:
            for number, key in enumerate(keys):
                yield number, key.decode(errors="replace"), partial(transaction.get, key)

    return files(), len(keys)


def _of_files(
    data: Data,
    where: str,
    splits: dict[str, Rows],
    files: Iterator[File],
    source: dict[str, Any],
    least: int = 1,
) -> ImageSet:
    """A set of RGB pictures of a published side, SIDES."""
    side = SIDES[data.name]
    decode = partial(_imagefiles.decode, resolution=side, channels=3, crop=data.crop, least=least)
    return ImageSet(where, (3, side, side), splits, _imagefiles.decoded(files, decode), source)


def _named(data: Data, root: Path) -> str:
    return str(root) if data.root or root == _sources.DEBIAN_FASHION_MNIST else _sources.PUBLISHED[data.name][0].urls[0]


def _expect_number(path: Path, name: str, n: int) -> None:
    if n != PICTURES[name]:
        log.warning("%s holds %s pictures, the published one %s", path, f"{n:,}", f"{PICTURES[name]:,}")


def _image_folder(data: Data) -> ImageSet:
    if data.resolution is None or data.channels is None:
        key, allowed = ("resolution", "a whole number >= 2") if data.resolution is None else ("channels", "1 or 3")
        raise ParamsError(f"data.{key}=null: expected {allowed}, since a folder of images has none of its own")
    (root,) = _sources.fetch(data)
    paths = _imagefiles.list_images(root)
    sides, names = layout(paths)
    classes, labels = None, None
    if names is not None:
        kinds, inverse = np.unique(names, return_inverse=True)
        classes, labels = kinds.tolist(), inverse.astype(np.int64)
    if sides is None:
        groups = np.zeros(len(paths), np.int64) if labels is None else labels
        splits = draw_split(groups, data.test_fraction, data.seed)
    else:
        splits = {split: np.flatnonzero(np.asarray(sides) == split) for split in SPLITS}
    source = {
        "from": str(root),
        "split": _how_drawn(data) if sides is None else "by the folders train and test",
        "files": len(paths),
    }
    decode = partial(_imagefiles.decode, resolution=data.resolution, channels=data.channels, crop=data.crop)
    images = _imagefiles.decoded(_imagefiles.stored(root, paths), decode)
    shape = (data.channels, data.resolution, data.resolution)
    return ImageSet(str(root), shape, splits, images, source, labels, classes)


def layout(paths: list[str]) -> tuple[list[str] | None, list[str] | None]:
    """Read split and label of every image from its folders.

    Folders that all images share say nothing (a wrapper such as cifar10/, or the only class), so they are skipped
    first. Then train/ and test/, where both exist, are the split, and the next folder is the label.

    Args:
        paths: Of the images, relative to the root.

    Returns:
        "train" or "test" of each image, and its label; None in place of what the folders do not tell. Labels need
        two classes: with one there is nothing to tell apart.

    Raises:
        StageError: If there are images beside train/ and test/, which could be meant for either or for neither.
    """
    folders = [PurePosixPath(path).parts[:-1] for path in paths]
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*folders, strict=False)))
    folders = [folder[shared:] for folder in folders]
    sides = None
    if {("train",), ("test",)} <= {folder[:1] for folder in folders}:
        beside = [
            path for path, folder in zip(paths, folders, strict=True) if folder[:1] not in {("train",), ("test",)}
        ]
        if beside:
            raise StageError(
                f"{len(beside)} images lie beside the folders train and test, the first is {beside[0]}: "
                "expected all images below these two, or no such folders"
            )
        sides = [folder[0] for folder in folders]
        folders = [folder[1:] for folder in folders]
    labels = [folder[0] for folder in folders if folder]
    return sides, labels if len(labels) == len(paths) and len(set(labels)) > 1 else None


def _patches(data: Data) -> ImageSet:
    from sklearn.datasets import load_sample_image

    _expect_no_root(data)
    photographs: list[Images] = [load_sample_image(photograph["file"]) for photograph in PHOTOGRAPHS]
    height, width, _ = photographs[0].shape
    most = min(height, width // 2)
    side = data.resolution
    if side is None or side > most:
        shown = "null" if side is None else side
        raise ParamsError(f"data.resolution={shown}: expected a whole number from 2 to {most} with data=patches")
    corners = patch_corners(height, width, side, data.test_fraction)
    patches = {
        split: [photo[top : top + side, left : left + side] for photo in photographs for top, left in corners[split]]
        for split in SPLITS
    }
    images = np.stack(patches["train"] + patches["test"]).transpose(0, 3, 1, 2)
    rows = np.arange(len(images))
    cut = len(patches["train"])
    source = {
        "from": "scikit-learn's load_sample_image",
        "split": f"by region: the right of each photograph for test, test_fraction {data.test_fraction:g}",
        "photographs": list(PHOTOGRAPHS),
    }
    return _of_array(data, images, {"train": rows[:cut], "test": rows[cut:]}, source)


def patch_corners(height: int, width: int, side: int, test_fraction: float) -> dict[str, list[tuple[int, int]]]:
    """Where the patches of one photograph lie: a grid of stride side // 2 on either side of a vertical cut.

    The right `test_fraction` of the width, at least one patch, is for test; no patch crosses the cut, so that no
    pixel is in both splits.

    Args:
        height: Of the photograph, in pixels, at least `side`.
        width: Of the photograph, in pixels, at least twice `side`.
        side: Of the patches, in pixels, at least 2.
        test_fraction: Share of the width, in (0, 1).

    Returns:
        (top, left) of every patch of each split.
    """
    cut = min(max(round(width * (1 - test_fraction)), side), width - side)
    tops = range(0, height - side + 1, side // 2)
    lefts = {"train": range(0, cut - side + 1, side // 2), "test": range(cut, width - side + 1, side // 2)}
    return {split: [(top, left) for top in tops for left in lefts[split]] for split in SPLITS}


def _expect_no_root(data: Data) -> None:
    if data.root is not None:
        raise ParamsError(
            f"data.root={data.root!r}: expected null with data={data.name}, which is read from scikit-learn; "
            "data=image_folder takes a folder"
        )


def _expect_own_shape(data: Data, channels: int, side: int) -> None:
    takers = {"resolution": "image_folder and patches take a resolution", "channels": "image_folder takes channels"}
    for key, own in (("resolution", side), ("channels", channels)):
        value = getattr(data, key)
        if value not in (None, own):
            raise ParamsError(f"data.{key}={value}: expected {own} or null with data={data.name}; only {takers[key]}")


def draw_split(groups: Labels, test_fraction: float, seed: int) -> dict[str, Rows]:
    """Draw the same share of every group for test, at least one and not all where the group has two or more.

    Args:
        groups: (N,), the group of each image: its label, or one number for all.
        test_fraction: In (0, 1).
        seed: Of the draw.

    Returns:
        Row numbers of each split, ascending; together 0 to N - 1.
    """
    rng = np.random.default_rng(seed)
    is_test = np.zeros(len(groups), np.bool_)
    for group in np.unique(groups):
        members = rng.permutation(np.flatnonzero(groups == group))
        n = len(members)
        is_test[members[: min(max(round(n * test_fraction), 1), n - 1)]] = True
    return {"train": np.flatnonzero(~is_test), "test": np.flatnonzero(is_test)}


def _how_drawn(data: Data) -> str:
    return f"drawn with seed {data.seed}, test_fraction {data.test_fraction:g}"
