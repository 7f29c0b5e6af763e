"""Pictures in folders, archives and databases: found, read one after the other, decoded on all processors."""

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline._stage import StageError, log

SUFFIXES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
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
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)
PENDING = 64  # pictures that are read ahead of those that are decoded
Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Unreadable:
    """A picture that is left out, and why."""

    path: str
    error: str


Numbered = tuple[int, Images | Unreadable]
File = tuple[int, str, Callable[[], bytes]]  # number, path, reader of the content


def list_images(root: Path) -> list[str]:
    """The sorted paths of the images in a folder or archive; raises StageError if there are none."""
    log.info("listing the images in %s", root)
    paths = sorted({path for path, _ in _image_files(root)})
    if not paths:
        raise StageError(f"{root} holds no images: expected files ending in {', '.join(SUFFIXES)}")
    return paths


def stored(root: Path, paths: list[str]) -> Iterator[File]:
    """The images of a folder or archive, as they are stored, numbered by `paths`."""
    numbers = {path: number for number, path in enumerate(paths)}
    seen = np.zeros(len(paths), np.bool_)
    for path, read in _image_files(root):
        number = numbers.get(path)
        if number is not None:
            seen[number] = True
            yield number, path, read
    for missing in np.flatnonzero(~seen).tolist():
        yield missing, paths[missing], _gone


def _gone() -> bytes:
    raise FileNotFoundError("gone between listing and reading")


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
                        yield str(inside), partial(extract, archive, member)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise StageError(
            f"{root} cannot be read: {error}; expected a folder or a whole .tar, .tar.gz or .tgz of images"
        ) from error


def _reraise(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that it may not list


def extract(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise OSError("not a regular file")
    return file.read()


def _is_image(path: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def database(path: Path) -> Any:
    """An LMDB, opened to read.

    Raises:
        StageError: If it is none, or not all of one: reading past its end would kill the process.
    """
    import lmdb

    try:
        database = lmdb.open(str(path), readonly=True, lock=False)
    except lmdb.Error as error:
        raise StageError(f"{path} is no LMDB: {error}; expected a folder with data.mdb") from error
    least = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
    size = (path / "data.mdb").stat().st_size
    if size < least:
        raise StageError(f"{path}/data.mdb has {size:,} bytes, expected {least:,}: unpack or copy it anew")
    return database


def decoded(files: Iterator[File], decode: Callable[[bytes], Images]) -> Iterator[Numbered]:
    """Decode pictures on all processors; they are read here, one after the other, and come in that order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and scales without Python's lock
        waiting: deque[tuple[int, Future[Images | Unreadable]]] = deque()
        for number, path, read in files:
            waiting.append((number, pool.submit(_readable, path, _content(read), decode)))
            if len(waiting) > PENDING:
                first, future = waiting.popleft()
                yield first, future.result()
        for number, future in waiting:
            yield number, future.result()


def _content(read: Callable[[], bytes]) -> bytes | Exception:
    try:
        return read()
    except BROKEN as error:
        return error


def _readable(path: str, content: bytes | Exception, decode: Callable[[bytes], Images]) -> Images | Unreadable:
    try:
        if isinstance(content, Exception):
            raise content
        return decode(content)
    except BROKEN as error:
        return Unreadable(path, f"{type(error).__name__}: {error}")


def decode(content: bytes, resolution: int, channels: int, crop: int | None, least: int = 1) -> Images:
    """Decode one image file, upright and on white, scale its shortest side to `resolution`, crop the centre.

    Sizes and places are rounded as torchvision's Resize and CenterCrop round them, which the papers' code used.

    Args:
        content: The file's bytes.
        resolution: Side of the result, in pixels.
        channels: 1 (grey) or 3 (RGB).
        crop: Side of the square at the centre that is kept of the file's pixels, before scaling; None keeps all.
        least: What the image's shortest side must have, in pixels.

    Returns:
        uint8, (channels, resolution, resolution).

    Raises:
        ValueError: On an image smaller than `least` or the crop, on 32-bit pixels, whose range is not known, and on
            other content than an image.
        BROKEN: On a broken image.
    """
    try:
        file = Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:  # its message holds a memory address, another one in every run
        raise ValueError(f"{len(content)} bytes in no known image format") from error
    image: Image.Image = ImageOps.exif_transpose(file)
    if min(image.size) < least:
        raise ValueError(f"{image.width}x{image.height} pixels, fewer than {least}")
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
    width, height = (resolution * side // min(image.size) for side in image.size)
    # Pillow widens the bilinear kernel when it shrinks: antialiased
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    image = _centre(image, resolution)
    return np.asarray(image).reshape(resolution, resolution, channels).transpose(2, 0, 1)


def _centre(image: Image.Image, side: int) -> Image.Image:
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))
