"""Turn the configured data set into out/data: uint8 arrays (N, C, H, W), labels, a manifest and a picture.

data=digits                  the 8x8 grey digits inside scikit-learn
data=mnist, fashion_mnist    28x28 grey, IDX files
data=cifar10                 32x32 RGB, the official Python batches
data=celeba32, celeba64      RGB faces: the 140x140 pixels at the centre, scaled
data=lsun_church96, lsun_bedroom128, lsun_tower128
                             RGB scenes from LSUN's databases: shortest side scaled, centre cropped
data=ffhq256                 256x256 RGB faces, from a folder or a database of pictures
data=image_folder            any folder, .tar, .tar.gz or .tgz of images, data.root; shortest side scaled to
                             data.resolution, centre cropped
data=patches                 RGB patches of scikit-learn's two photographs, of side data.resolution

What is published is downloaded first, as `python -m pipeline.fetch` does; docs/data.md has files, sizes and licences.
Writes train.npy, test.npy, train_labels.npy and test_labels.npy (labelled sets only), manifest.json, examples.png.
The same input gives the same bytes. Memory does not grow with the set, but for the paths of a folder of images.
"""

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline import _datasets, _stage
from pipeline._datasets import ImageSet, Labels, Rows
from pipeline._imagefiles import Images, Unreadable
from pipeline._params import Params
from pipeline._stage import StageError, log
from pipeline._store import read_json, replacing_folder, write_json

SPLITS = _datasets.SPLITS
OUT = Path("out/data")
UNREADABLE_SHARE = 0.01
BLOCK = 1 << 24  # bytes


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
    found = _datasets.find(data)
    channels, height, width = found.shape
    with replacing_folder(OUT) as part:
        kept, digests, unreadable = _write_images(part, found)
        splits = {split: _entry(part, split, kept[split], digests[split], found) for split in SPLITS}
        written = {
            "name": data.name,
            "shape": [channels, height, width],
            "classes": found.classes,
            "source": found.source,
            "unreadable": [{"path": each.path, "error": each.error} for each in unreadable],
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


def _write_images(folder: Path, found: ImageSet) -> tuple[dict[str, Rows], dict[str, str], list[Unreadable]]:
    """Write train.npy and test.npy.

    Returns:
        The numbers of the images in each, in their order; the SHA-256 of each array; what could not be read.

    Raises:
        StageError: If more than UNREADABLE_SHARE cannot be read, or no image is left for a split.
    """
    n = 1 + max(int(rows.max(initial=-1)) for rows in found.splits.values())
    total = sum(len(rows) for rows in found.splits.values())
    side, place = np.full(n, -1, np.int8), np.zeros(n, np.int64)
    for index, split in enumerate(SPLITS):
        side[found.splits[split]] = index
        place[found.splits[split]] = np.arange(len(found.splits[split]))
    errors: dict[int, Unreadable] = {}
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / f"{split}.npy", "w+b")) for split in SPLITS]
        arrays = [
            _Array(file, len(found.splits[split]), found.shape) for file, split in zip(files, SPLITS, strict=True)
        ]
        for number, image in tqdm(found.images, "images", total, unit="", disable=None):
            if isinstance(image, Unreadable):
                errors[number] = image
                arrays[side[number]].drop(place[number])
            else:
                errors.pop(number, None)  # an archive may hold a path twice: the last one counts
                arrays[side[number]].write(place[number], image)
        unreadable = [errors[number] for number in sorted(errors)]
        kept = {split: found.splits[split][array.written] for split, array in zip(SPLITS, arrays, strict=True)}
        _expect_enough(found.where, total, unreadable, kept)
        return kept, {split: array.finish() for split, array in zip(SPLITS, arrays, strict=True)}, unreadable


def _expect_enough(where: str, total: int, unreadable: list[Unreadable], kept: dict[str, Rows]) -> None:
    if len(unreadable) > UNREADABLE_SHARE * total:
        first = "; ".join(f"{each.path}: {each.error}" for each in unreadable[:3])
        raise StageError(
            f"{where}: {len(unreadable)} of {total} images cannot be read, more than {UNREADABLE_SHARE:.0%}; "
            f"the first: {first}. Repair or remove them"
        )
    if not all(len(rows) for rows in kept.values()):
        raise StageError(
            f"{where}: {total - len(unreadable)} readable images give {len(kept['train'])} to train on and "
            f"{len(kept['test'])} to test with: expected at least one of each, and two of some class"
        )


class _Array:
    """An .npy file of images that are written in any order, without holding them; rows left out are closed up.

    Args:
        file: Empty, open to read and write.
        n: How many images there are at most.
        shape: (C, H, W).
    """

    def __init__(self, file: IO[bytes], n: int, shape: tuple[int, int, int]) -> None:
        self.file, self.shape, self.stride = file, shape, int(np.prod(shape))
        self.written = np.zeros(n, np.bool_)
        self._header(n)
        self.start = file.tell()

    def write(self, row: int, image: Images) -> None:
        self.file.seek(self.start + int(row) * self.stride)
        self.file.write(image.tobytes())
        self.written[row] = True

    def drop(self, row: int) -> None:
        self.written[row] = False

    def finish(self) -> str:
        """Move the rows that were written together; the SHA-256 of the array's bytes."""
        digest = hashlib.sha256()
        rows = np.flatnonzero(self.written)
        step = max(1, BLOCK // self.stride)
        for first in range(0, len(rows), step):
            block = rows[first : first + step]
            self.file.seek(self.start + int(block[0]) * self.stride)
            span = self.file.read(int(block[-1] + 1 - block[0]) * self.stride)
            content = np.frombuffer(span, np.uint8).reshape(-1, self.stride)[block - block[0]]
            if block[-1] >= first + len(block):
                self.file.seek(self.start + first * self.stride)
                self.file.write(content.tobytes())
            digest.update(content.data)
        self.file.truncate(self.start + len(rows) * self.stride)
        self._header(len(rows))
        return digest.hexdigest()

    def _header(self, n: int) -> None:
        """Write the head of the file, whose length does not depend on n: numpy leaves room for it to grow."""
        self.file.seek(0)
        kind = {"descr": "|u1", "fortran_order": False, "shape": (n, *self.shape)}
        np.lib.format.write_array_header_1_0(self.file, kind)


def _entry(folder: Path, split: str, kept: Rows, digest: str, found: ImageSet) -> dict[str, Any]:
    """Write the labels of one split; what the manifest says of it."""
    entry: dict[str, Any] = {"n": len(kept), "sha256": digest, "labels_sha256": None, "per_class": None}
    if found.labels is not None and found.classes is not None:
        labels = found.labels[kept]
        np.save(folder / f"{split}_labels.npy", labels)
        entry["labels_sha256"] = hashlib.sha256(labels.tobytes()).hexdigest()
        counts = np.bincount(labels, minlength=len(found.classes))
        entry["per_class"] = dict(zip(found.classes, counts.tolist(), strict=True))
    return entry


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
