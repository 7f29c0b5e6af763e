"""Turn the configured data set into out/data: uint8 arrays (N, C, H, W), labels, a manifest and a picture.

data=digits         the 8x8 grey digits inside scikit-learn
data=fashion_mnist  IDX files, plain or .gz, in the folder data.root
data=image_folder   any folder, .tar, .tar.gz or .tgz of images, data.root; scaled and cropped to data.resolution
data=patches        RGB patches of scikit-learn's two photographs, of side data.resolution

Writes train.npy, test.npy, train_labels.npy and test_labels.npy (labelled sets only), manifest.json, examples.png.
The same input gives the same bytes.
"""

import gzip
import hashlib
import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from pipeline import _stage
from pipeline._params import Data, Params, ParamsError
from pipeline._stage import StageError, log
from pipeline._store import read_json, replacing_folder, write_json

OUT = Path("out/data")
SPLITS = ("train", "test")
SUFFIXES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
UNREADABLE_SHARE = 0.01
# What Pillow's decoders, and a link inside an archive, raise
BROKEN = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    NotImplementedError,
    struct.error,
    zlib.error,
    tarfile.TarError,
    Image.DecompressionBombError,
)
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

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Rows = NDArray[np.intp]


@dataclass(frozen=True)
class _Set:
    """A data set in memory.

    Args:
        images: uint8, (N, C, H, W).
        splits: Row numbers of the images of "train" and of "test"; rows in neither are left out.
        source: Where the images come from and how they were split, as JSON.
        labels: int64, (N,), row numbers of `classes`; None if unlabelled.
        classes: Their names; None if unlabelled.
        unreadable: {"path", "error"} of each file left out.
    """

    images: Images
    splits: dict[str, Rows]
    source: dict[str, Any]
    labels: Labels | None = None
    classes: list[str] | None = None
    unreadable: list[dict[str, str]] = field(default_factory=list)


def load(split: str, folder: Path | str = OUT) -> tuple[Images, Labels | None]:
    """The images of one split, memory-mapped, and its labels.

    Args:
        split: "train" or "test".
        folder: What this stage wrote.

    Returns:
        uint8 (N, C, H, W), and int64 (N,) or None if the set is unlabelled.

    Raises:
        StageError: If the split has not been written.
    """
    path, labels = Path(folder, f"{split}.npy"), Path(folder, f"{split}_labels.npy")
    if not path.is_file():
        raise StageError(f"{path} does not exist: write it with `dvc repro prepare`")
    return np.load(path, mmap_mode="r"), np.load(labels) if labels.is_file() else None


def manifest(folder: Path | str = OUT) -> dict[str, Any]:
    """What is known of the set: name, shape, classes, source, unreadable files, and each split's size and hashes.

    Raises:
        StageError: If it has not been written.
    """
    path = Path(folder, "manifest.json")
    if not path.is_file():
        raise StageError(f"{path} does not exist: write it with `dvc repro prepare`")
    return dict(read_json(path))


def main(params: Params) -> None:
    """Write out/data.

    Raises:
        ParamsError: On a data.* value that the set cannot have.
        StageError: On missing, broken or too few images.
    """
    data = params.data
    build = {"digits": _digits, "fashion_mnist": _fashion_mnist, "image_folder": _image_folder, "patches": _patches}
    found = build[data.name](data)
    channels, height, width = found.images.shape[1:]
    with replacing_folder(OUT) as part:
        splits = {split: _write_split(part, split, found) for split in SPLITS}
        written = {
            "name": data.name,
            "shape": [channels, height, width],
            "classes": found.classes,
            "source": found.source,
            "unreadable": found.unreadable,
            "splits": splits,
        }
        write_json(part / "manifest.json", written)
        _examples(load("train", part)[0]).save(part / "examples.png")
    log.info(
        "%s: %s train and %s test images of %dx%dx%d, %s, from %s, split %s; written to %s",
        data.name,
        *(f"{splits[split]['n']:,}" for split in SPLITS),
        *(channels, height, width),
        f"{len(found.classes)} classes" if found.classes else "unlabelled",
        found.source["from"],
        found.source["split"],
        OUT,
    )


def _digits(data: Data) -> _Set:
    from sklearn.datasets import load_digits

    _expect_no_root(data)
    bunch = load_digits()
    images: Images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels: Labels = bunch.target.astype(np.int64)
    _expect_own_shape(data, images)
    source = {
        "from": "scikit-learn's load_digits",
        "reference": "Alpaydin & Kaynak (1998), Optical Recognition of Handwritten Digits, UCI, doi:10.24432/C50P49",
        "split": _how_drawn(data),
    }
    splits = _draw_split(labels, data.test_fraction, data.seed)
    return _Set(images, splits, source, labels, [str(name) for name in bunch.target_names])


def _fashion_mnist(data: Data) -> _Set:
    root = Path(data.root or "").expanduser()
    images: list[Images] = []
    labels: list[Images] = []
    files = {}
    for prefix in ("train", "t10k"):
        for kind, arrays in (("images-idx3", images), ("labels-idx1", labels)):
            path = _find_idx(root, f"{prefix}-{kind}-ubyte", data.root)
            content = path.read_bytes()
            files[path.name] = hashlib.sha256(content).hexdigest()
            arrays.append(_read_idx(path, content, ndim=3 if kind == "images-idx3" else 1))
        if len(images[-1]) != len(labels[-1]):
            raise StageError(f"{root}: {len(images[-1])} {prefix} images but {len(labels[-1])} labels")
    if images[0].shape[1:] != images[1].shape[1:]:
        raise StageError(f"{root}: train images are {images[0].shape[1:]}, test images {images[1].shape[1:]}")
    joined = np.concatenate(labels).astype(np.int64)
    if joined.max() >= len(FASHION_CLASSES):
        raise StageError(f"{root}: label {joined.max()}, expected 0 to {len(FASHION_CLASSES) - 1}")
    found = np.concatenate(images)[:, None]
    _expect_own_shape(data, found)
    rows = np.arange(len(found))
    source = {
        "from": str(root),
        "reference": "Xiao, Rasul & Vollgraf (2017), Fashion-MNIST, arXiv:1708.07747, MIT licence",
        "split": "as the set comes",
        "files": files,
    }
    splits = {"train": rows[: len(images[0])], "test": rows[len(images[0]) :]}
    return _Set(found, splits, source, joined, list(FASHION_CLASSES))


def _find_idx(root: Path, name: str, given: str | None) -> Path:
    fix = "install the set with `apt-get install dataset-fashion-mnist` or give its folder as data.root=..."
    if given is None or not root.is_dir():
        raise StageError(f"data.root={given}: no such folder; {fix}")
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise StageError(f"{root / name} does not exist, nor {name}.gz beside it; {fix}")


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


def _image_folder(data: Data) -> _Set:
    if data.resolution is None or data.channels is None:
        key, allowed = ("resolution", "a whole number >= 2") if data.resolution is None else ("channels", "1 or 3")
        raise ParamsError(f"data.{key}=null: expected {allowed}, since a folder of images has none of its own")
    root = Path(data.root or "").expanduser()
    if data.root is None or not root.exists():
        raise StageError(
            f"data.root={data.root} does not exist: expected a folder or a .tar, .tar.gz or .tgz of images"
        )
    log.info("listing the images in %s", root)
    paths = sorted({path for path, _ in _image_files(root)})
    if not paths:
        raise StageError(f"{root} holds no images: expected files ending in {', '.join(SUFFIXES)}")
    sides, names = _layout(paths)
    images, errors = _decode_all(root, paths, data.resolution, data.channels, data.crop)
    if len(errors) > UNREADABLE_SHARE * len(paths):
        first = "; ".join(f"{path}: {error}" for path, error in list(errors.items())[:3])
        raise StageError(
            f"{root}: {len(errors)} of {len(paths)} images cannot be read, more than {UNREADABLE_SHARE:.0%}; "
            f"the first: {first}. Repair or remove them"
        )
    rows = np.flatnonzero([path not in errors for path in paths])
    classes, labels = None, None
    if names is not None:
        kinds, inverse = np.unique(names, return_inverse=True)
        classes, labels = kinds.tolist(), inverse.astype(np.int64)
    if sides is None:
        groups = np.zeros(len(rows), np.int64) if labels is None else labels[rows]
        drawn = _draw_split(groups, data.test_fraction, data.seed)
        splits = {split: rows[index] for split, index in drawn.items()}
    else:
        splits = {split: rows[np.asarray(sides)[rows] == split] for split in SPLITS}
    if not all(index.size for index in splits.values()):
        raise StageError(
            f"{root}: {len(rows)} readable images give {splits['train'].size} to train on and "
            f"{splits['test'].size} to test with: expected at least one of each, and two of some class"
        )
    source = {
        "from": str(root),
        "split": _how_drawn(data) if sides is None else "by the folders train and test",
        "files": len(paths),
    }
    unreadable = [{"path": path, "error": error} for path, error in errors.items()]
    return _Set(images, splits, source, labels, classes, unreadable)


def _image_files(root: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield path and reader of every image in a folder or archive, in stored order; call a reader before the next one.

    Archives are read as a stream: nothing is written to disk, whatever paths they name.

    Raises:
        StageError: If the folder or archive cannot be read to its end.
    """
    try:
        if root.is_dir():
            for folder, _, names in os.walk(root, onerror=_reraise, followlinks=True):
                for name in names:
                    file = Path(folder, name)
                    inside = PurePosixPath(file.relative_to(root).as_posix())
                    if _is_image(inside):
                        yield str(inside), file.read_bytes
        else:
            with tarfile.open(root, "r|*") as archive:
                for member in archive:
                    inside = PurePosixPath(member.name)
                    if not member.isdir() and _is_image(inside):
                        yield str(inside), partial(_extract, archive, member)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise StageError(
            f"{root} cannot be read: {error}; expected a folder or a whole .tar, .tar.gz or .tgz of images"
        ) from error


def _reraise(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that it may not list


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise OSError("not a regular file")
    return file.read()


def _is_image(path: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def _layout(paths: list[str]) -> tuple[list[str] | None, list[str] | None]:
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


def _decode_all(
    root: Path, paths: list[str], resolution: int, channels: int, crop: int | None
) -> tuple[Images, dict[str, str]]:
    """Decode the images into one array, row i from paths[i]; also the error of each file that cannot be, by path."""
    rows = {path: row for row, path in enumerate(paths)}
    images = np.zeros((len(paths), channels, resolution, resolution), np.uint8)
    errors = dict.fromkeys(paths, "gone between listing and reading")
    for path, read in tqdm(_image_files(root), "images", len(paths), unit="", disable=None):
        row = rows[path]
        try:
            images[row] = _decode(read(), resolution, channels, crop)
        except BROKEN as error:
            errors[path] = f"{type(error).__name__}: {error}"
        else:
            errors.pop(path, None)  # an archive may hold a path twice: the last one counts
    return images, errors


def _decode(content: bytes, resolution: int, channels: int, crop: int | None) -> Images:
    """Decode one image file, upright and on white, scale its shortest side to `resolution`, crop the centre.

    Args:
        content: The file's bytes.
        resolution: Side of the result, in pixels.
        channels: 1 (grey) or 3 (RGB).
        crop: Side of the square at the centre that is kept of the file's pixels, before scaling; None keeps all.

    Returns:
        uint8, (channels, resolution, resolution).

    Raises:
        ValueError: On an image smaller than the crop, on 32-bit pixels, whose range is not known, and on other content
            than an image.
        BROKEN: On a broken image.
    """
    try:
        file = Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:  # its message holds a memory address, another one in every run
        raise ValueError(f"{len(content)} bytes in no known image format") from error
    image: Image.Image = ImageOps.exif_transpose(file)
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}: expected 8 or 16 bits per channel")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if crop is not None:
        if min(image.size) < crop:
            raise ValueError(f"{image.width}x{image.height} pixels, fewer than data.crop={crop}")
        image = _centre(image, crop)
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    # Pillow widens the bilinear kernel when it shrinks: antialiased
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    image = _centre(image, resolution)
    return np.asarray(image).reshape(resolution, resolution, channels).transpose(2, 0, 1)


def _centre(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _patches(data: Data) -> _Set:
    from sklearn.datasets import load_sample_image

    _expect_no_root(data)
    photographs: list[Images] = [load_sample_image(photograph["file"]) for photograph in PHOTOGRAPHS]
    height, width, _ = photographs[0].shape
    most = min(height, width // 2)
    side = data.resolution
    if side is None or side > most:
        shown = "null" if side is None else side
        raise ParamsError(f"data.resolution={shown}: expected a whole number from 2 to {most} with data=patches")
    corners = _patch_corners(height, width, side, data.test_fraction)
    patches = {
        split: [photo[top : top + side, left : left + side] for photo in photographs for top, left in corners[split]]
        for split in SPLITS
    }
    images = np.stack(patches["train"] + patches["test"]).transpose(0, 3, 1, 2)
    _expect_own_shape(data, images)
    rows = np.arange(len(images))
    cut = len(patches["train"])
    source = {
        "from": "scikit-learn's load_sample_image",
        "split": f"by region: the right of each photograph for test, test_fraction {data.test_fraction:g}",
        "photographs": list(PHOTOGRAPHS),
    }
    return _Set(images, {"train": rows[:cut], "test": rows[cut:]}, source)


def _patch_corners(height: int, width: int, side: int, test_fraction: float) -> dict[str, list[tuple[int, int]]]:
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


def _expect_own_shape(data: Data, images: Images) -> None:
    takers = {"resolution": "image_folder and patches take a resolution", "channels": "image_folder takes channels"}
    for key, own in (("resolution", images.shape[2]), ("channels", images.shape[1])):
        value = getattr(data, key)
        if value not in (None, own):
            raise ParamsError(f"data.{key}={value}: expected {own} or null with data={data.name}; only {takers[key]}")


def _draw_split(groups: Labels, test_fraction: float, seed: int) -> dict[str, Rows]:
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


def _write_split(folder: Path, split: str, found: _Set) -> dict[str, Any]:
    """Write the arrays of one split and return its entry in the manifest."""
    rows = found.splits[split]
    entry: dict[str, Any] = {
        "n": len(rows),
        "sha256": _save_rows(folder / f"{split}.npy", found.images, rows),
        "labels_sha256": None,
        "per_class": None,
    }
    if found.labels is not None and found.classes is not None:
        entry["labels_sha256"] = _save_rows(folder / f"{split}_labels.npy", found.labels, rows)
        counts = np.bincount(found.labels[rows], minlength=len(found.classes))
        entry["per_class"] = dict(zip(found.classes, counts.tolist(), strict=True))
    return entry


def _save_rows(path: Path, array: NDArray[Any], rows: Rows) -> str:
    """Write array[rows] as .npy, a block at a time to hold no second copy; returns the SHA-256 of the array's bytes."""
    digest = hashlib.sha256()
    saved = np.lib.format.open_memmap(path, "w+", array.dtype, (len(rows), *array.shape[1:]))
    for start in range(0, len(rows), 4096):
        block = np.ascontiguousarray(array[rows[start : start + 4096]])
        saved[start : start + 4096] = block
        digest.update(block.data)
    return digest.hexdigest()


def _examples(images: Images, side: int = 10, width: int = 400) -> Image.Image:
    """A grid of side x side images, evenly spaced through the set, enlarged by a whole number to `width` or more."""
    n, channels, height, own_width = images.shape
    rows = np.unique(np.linspace(0, n - 1, side**2).astype(int))
    tiles = np.full((side**2, channels, height, own_width), 255, np.uint8)
    tiles[: len(rows)] = images[rows]
    grid = tiles.reshape(side, side, channels, height, own_width).transpose(0, 3, 1, 4, 2)
    picture = Image.fromarray(grid.reshape(side * height, side * own_width, channels).squeeze())
    scale = -(-width // picture.width)
    return picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.NEAREST)


if __name__ == "__main__":
    _stage.run("prepare", __doc__, main)
