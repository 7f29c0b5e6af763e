"""The published files that a run reads: which, from where, with what digest; fetched whole or not at all.

A download goes on where an earlier one stopped, is checked by its digest, and only then takes its name.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from pipeline._params import Data
from pipeline._stage import StageError, log
from pipeline._store import replacing

CACHE = "data"  # beside the project; the environment variable NCSN_DATA names another folder
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FFHQ = "https://github.com/NVlabs/ffhq-dataset"
CHUNK = 1 << 20
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces


@dataclass(frozen=True)
class Source:
    """A published file.

    Args:
        name: Below its data set's folder.
        size: In bytes, for people.
        digest: "md5:" or "sha256:" and the hex digits, or the first of them.
        urls: Where it is, in the order to try.
        instead: What does as well, where it is there: the content of the archive, say.
        strict: Whether a file of this name in a person's own folder must have the digest, too.
    """

    name: str
    size: int
    digest: str
    urls: tuple[str, ...]
    instead: str | None = None
    strict: bool = True

    def __str__(self) -> str:
        return f"{self.name} ({self.size:,} bytes, {self.digest})"


def _idx(mirrors: tuple[str, ...], *files: tuple[str, int, str]) -> tuple[Source, ...]:
    """Files in the IDX format: they also come repacked, or unpacked, so those in a person's own folder are taken."""
    return tuple(
        Source(f"{name}.gz", size, f"md5:{md5}", tuple(f"{url}{name}.gz" for url in mirrors), name, strict=False)
        for name, size, md5 in files
    )


def _lsun(category: str, *files: tuple[str, int, str]) -> tuple[Source, ...]:
    return tuple(
        Source(f"{name}.zip", size, f"sha256:{digest}", (f"http://dl.yf.io/lsun/scenes/{name}.zip",), name)
        for name, size, digest in ((f"{category}_{split}_lmdb", size, digest) for split, size, digest in files)
    )


def _drive(file: str) -> tuple[str, ...]:
    return (f"https://drive.usercontent.google.com/download?id={file}&export=download&confirm=t",)


CELEBA = (
    Source(
        "img_align_celeba.zip",
        1_443_490_838,
        "md5:00d2c5bc6d35e252742224ab0c1e8fcb",
        _drive("0B7EVK8r0v71pZjFTYXZWM3FlRnM"),
        "img_align_celeba",
    ),
    Source(
        "list_eval_partition.txt",
        2_836_386,
        "md5:d32c9cbf5e040fd4025c592c306e6668",
        _drive("0B7EVK8r0v71pY0NSMzRuSXJEVkk"),
    ),
)
# Digests and addresses are torchvision's, which a test compares, and for LSUN those of tensorflow/datasets.
PUBLISHED: dict[str, tuple[Source, ...]] = {
    "mnist": _idx(
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
        ("train-images-idx3-ubyte", 9_912_422, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        ("train-labels-idx1-ubyte", 28_881, "d53e105ee54ea40749a09fcbcd1e9432"),
        ("t10k-images-idx3-ubyte", 1_648_877, "9fb629c4189551a2d022fa330f9573f3"),
        ("t10k-labels-idx1-ubyte", 4_542, "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
    "fashion_mnist": _idx(
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        ("train-images-idx3-ubyte", 26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        ("train-labels-idx1-ubyte", 29_515, "25c81989df183df01b3e8a0aad5dffbe"),
        ("t10k-images-idx3-ubyte", 4_422_102, "bef4ecab320f06d8554ea6380940ec79"),
        ("t10k-labels-idx1-ubyte", 5_148, "bb300cfdad3c16e7a12a480ee83cd310"),
    ),
    "cifar10": (
        Source(
            "cifar-10-python.tar.gz",
            170_498_071,
            "md5:c58f30108f718f92721af3b95e74349a",
            ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
            "cifar-10-batches-py",
        ),
    ),
    "celeba32": CELEBA,
    "celeba64": CELEBA,
    "lsun_church96": _lsun(
        "church_outdoor",
        ("train", 2_448_463_466, "91128ae026840ac0c5982b4445ab5fc4e092d6847cca76793b2b1a0815c2e74a"),
        ("val", 5_957_308, "34635b7547a3e51a15f942a4a4082dd6bc9cca381a953515cb2275c0eed50584"),
    ),
    "lsun_bedroom128": _lsun(
        "bedroom",
        ("train", 45_922_737_680, "a15644c2e7153106867f0adb3491fc41224102d1f01b24494fb47d9f5d1f174e"),
        ("val", 4_670_661, "5d022e781b241c25ec2e1f1f769afcdb8091d7fd58362667aec03137b8114b12"),
    ),
    "lsun_tower128": _lsun(
        "tower",
        ("train", 12_010_237_081, "440caec74c9641cb51fd235a5970c8e4931c3af875aeb044a8bcca956e106309"),
        ("val", 5_223_709, "7f5257847bc01f4e40d4a1b3e24dd8fcd37063f12ca8cf31e726c2ee0b1ae104"),
    ),
}
SHARED = {"celeba32": "celeba", "celeba64": "celeba"} | {name: "lsun" for name in PUBLISHED if name.startswith("lsun")}


def folder(data: Data) -> Path:
    """Where the files of a data set lie, or are to lie: data.root, else below the cache.

    Raises:
        StageError: If data.root is given and does not exist.
    """
    if data.root is not None:
        root = Path(data.root).expanduser()
        if not root.exists():
            raise StageError(
                f"data.root={data.root} does not exist: expected the folder that holds, or is to hold, the files of "
                f"{data.name}; null means {_cache(data.name)}"
            )
        parts = {name for source in PUBLISHED.get(data.name, ()) for name in (source.name, source.instead)}
        return root.parent if root.name in parts else root
    return DEBIAN_FASHION_MNIST if _packaged(data) else _cache(data.name)


def fetch(data: Data) -> list[Path]:
    """What holds the data set, in the order of `PUBLISHED`: its files, or what they would be unpacked to.

    Downloads those that are missing, cut short or not the published ones. A set of a person's own, and FFHQ, have to
    be there; those inside scikit-learn need nothing, and give an empty list.

    Raises:
        StageError: If one can neither be found nor downloaded; the message says which to put where.
    """
    sources = PUBLISHED.get(data.name, ())
    if not sources:
        return _by_hand(data)
    at = folder(data)
    own = data.root is not None or _packaged(data)
    hint = ", or name the folder that holds it with data.root=..."
    if data.name == "fashion_mnist":
        hint = ", `apt-get install dataset-fashion-mnist`" + hint
    paths = []
    for number, source in enumerate(sources):
        try:
            paths.append(_present(source, at, own) or download(source, at / source.name, hint))
        except StageError as error:
            missing = [
                f"{later} from {later.urls[0]}"
                for later in sources[number + 1 :]
                if not (_present(later, at, own) or (at / later.name).exists())
            ]
            beside = f"; also missing there: {', '.join(missing)}" if missing else ""
            raise StageError(f"{error}{beside}") from error
    return paths


def missing(data: Data) -> list[Source]:
    """The published files of a data set that `fetch` would download, by their names alone.

    Raises:
        StageError: If a set of a person's own, or FFHQ, is not there.
    """
    sources = PUBLISHED.get(data.name, ())
    if not sources:
        _by_hand(data)
        return []
    at, own = folder(data), data.root is not None or _packaged(data)
    return [each for each in sources if not (_present(each, at, own) or (at / each.name).is_file())]


def download(source: Source, path: Path, hint: str = "") -> Path:
    """Download a file to `path`, unless it is there already.

    What has arrived stays, under a hidden name beside it, when the connection or the process ends.

    Args:
        source: The file.
        path: Where it is to lie.
        hint: What else a person can do, as the end of the message.

    Returns:
        `path`.

    Raises:
        StageError: If it cannot be downloaded, or what is sent has another digest.
    """
    if path.is_file():
        wrong = digest_of(path, source.digest)
        if wrong is None:
            return path
        log.warning("%s is not the published file, or not all of it: it has %s; fetching it anew", path, wrong)
    part = path.with_name(f".{path.name}.part")
    reasons = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for url in source.urls:
            log.info("downloading %s from %s to %s", source, url, path.parent)
            reason = _arrive(url, part, source.digest)
            if reason is None:
                with replacing(path) as new:
                    part.rename(new)
                return path
            reasons.append(f"{urlsplit(url).netloc}: {reason}")
    except OSError as error:
        raise StageError(f"{path} cannot be written: {error.strerror or error}") from error
    raise StageError(
        f"{source} cannot be downloaded, {'; '.join(reasons)}: put {source.urls[0]} at {path.absolute()}{hint}"
    )


def _by_hand(data: Data) -> list[Path]:
    """The place of a data set that no program may download; nothing for those inside scikit-learn."""
    if data.name == "image_folder":
        if data.root is None or not (root := Path(data.root).expanduser()).exists():
            raise StageError(
                f"data.root={data.root} does not exist: expected a folder or a .tar, .tar.gz or .tgz of images"
            )
        return [root]
    if data.name == "ffhq256":
        root = folder(data)
        if not root.exists():
            raise StageError(
                f"{root.absolute()} does not exist: put FFHQ's 70,000 pictures there, 256x256 or larger, in a folder "
                f"or an LMDB, or name their place with data.root=...; they are to be had by hand, from {FFHQ}"
            )
        return [root]
    return []


def digest_of(path: Path, expected: str) -> str | None:
    """None if a file has the digest "md5:..." or "sha256:...", where the first digits will do; else the one it has."""
    kind, _, digits = expected.partition(":")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    return None if found.startswith(digits) else f"{kind}:{found}"


def _cache(name: str) -> Path:
    return Path(os.environ.get("NCSN_DATA") or CACHE).expanduser() / SHARED.get(name, name)


def _packaged(data: Data) -> bool:
    return data.name == "fashion_mnist" and data.root is None and DEBIAN_FASHION_MNIST.is_dir()


def _present(source: Source, at: Path, own: bool) -> Path | None:
    """What is there of a file; None if it is to be downloaded."""
    if source.instead is not None and (at / source.instead).exists():
        return at / source.instead
    if own and not source.strict and (at / source.name).is_file():
        return at / source.name
    return None


def _arrive(url: str, part: Path, digest: str) -> str | None:
    """Fill `part` from a URL, from where it ends; None when it has the digest, else why it does not."""
    import requests
    from urllib3.exceptions import HTTPError

    while True:
        start = part.stat().st_size if part.exists() else 0
        try:
            kind = _transfer(url, part, start)
        except requests.HTTPError as error:
            return f"HTTP {error.response.status_code} {error.response.reason}"
        except (requests.RequestException, HTTPError) as error:
            here = part.stat().st_size if part.exists() else 0
            if here > start:
                continue
            lost = f"the connection was lost after {here / 1e6:,.1f} MB, from where the same command goes on"
            timed_out = isinstance(error, requests.Timeout)
            return lost if here else "no answer" if timed_out else "no connection"
        wrong = digest_of(part, digest)
        if wrong is None:
            return None
        size = part.stat().st_size
        part.unlink()
        if not start:
            return f"sent something else, {size:,} bytes of {kind} with {wrong}"


def _transfer(url: str, part: Path, start: int) -> str:
    """Append to `part` what a URL has from byte `start` on, or write it anew if the server sends all; its type."""
    import requests

    headers = {"Range": f"bytes={start}-"} if start else {}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        kind = str(response.headers.get("Content-Type", "no type"))
        if start and response.status_code == requests.codes.requested_range_not_satisfiable:
            return kind  # nothing is missing, or too much is there: the digest will tell
        response.raise_for_status()
        resumed = response.status_code == requests.codes.partial_content
        length = int(response.headers.get("Content-Length") or 0)
        total = length + start * resumed or None
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(
                desc=part.name[1:-5], total=total, initial=start * resumed, unit="B", unit_scale=True, disable=None
            ) as bar,
        ):
            # As it is sent: some servers call a .gz file a gzip-encoded one, which would be unpacked on the way.
            for piece in response.raw.stream(CHUNK, decode_content=False):
                file.write(piece)
                bar.update(len(piece))
    return kind
