"""Find, read and download datasets in torchvision's file layout, with torchvision.

Torchvision is imported only when it is needed, since it loads torch, which takes seconds. Only CIFAR-10's batches are
pickles; torchvision compares the official MD5 of each before it opens any.
"""

import contextlib
import gzip
import io
import queue
import shutil
import socket
import tempfile
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from nkat_ray.data.dataset import (
    SPLITS,
    DataError,
    Labels,
    Layout,
    Pair,
    Shape,
    Split,
    SplitName,
    Unavailable,
    first_line,
)
from nkat_ray.data.spec import KNOWN, TORCHVISION

PROBE_S: Final = 6.0  # timeout of a host's first answer, including the name look-up
STALL_S: Final = 30.0  # longest time without a byte during a download
CLASSES: Final = {"cifar10": "CIFAR10", "mnist": "MNIST", "fashion_mnist": "FashionMNIST", "emnist_letters": "EMNIST"}
_MAX_BYTES: Final = 256 << 20  # of an unpacked file; the largest, of EMNIST letters, has 98 MB


def place(name: str) -> str:
    """Return the folder of a dataset, relative to torchvision's root."""
    return "cifar-10-batches-py" if name == "cifar10" else f"{CLASSES[name]}/raw"


def file_names(name: str) -> list[str]:
    """List the files of a dataset in its folder; those of the MNIST family may also end in `.gz`."""
    if name == "cifar10":
        return [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]
    stems = ("emnist-letters-train", "emnist-letters-test") if name == "emnist_letters" else ("train", "t10k")
    return [f"{stem}-{kind}-ubyte" for stem in stems for kind in ("images-idx3", "labels-idx1")]


@dataclass(frozen=True, kw_only=True)
class TorchvisionFiles(Layout):
    """A known dataset as torchvision leaves it on disk."""

    name: str
    root: Path

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return self.root / place(self.name)

    def present(self) -> list[Path]:
        """List the existing files, plain or compressed."""
        paths = [self.folder / file for file in file_names(self.name)]
        both = ((path, path.with_name(f"{path.name}.gz")) for path in paths)
        return [path for pair in both for path in pair if path.exists()]

    def files(self, split: SplitName) -> tuple[Path, ...]:
        """List all files, since a change of any one changes both splits."""
        return tuple(self.present())

    def size(self, split: SplitName) -> None:
        """Return None: counting the images requires reading the files."""

    def shape(self) -> Shape:
        """Return the shape of every image."""
        known = KNOWN[self.name]
        return known.channels, known.size, known.size

    def labels(self, split: SplitName) -> Labels:
        """Read all labels of a split, int64 (N,)."""
        return self.load(split, self.shape()).labels

    def load(self, split: SplitName, shape: Shape, rows: Labels | None = None) -> Split:
        """Read the images at `rows` (all when None). EMNIST letters are turned upright and counted from 0.

        Raises:
            DataError: a file is missing, truncated or has wrong content.
        """
        here = {path.name.removesuffix(".gz") for path in self.present()}
        if absent := [file for file in file_names(self.name) if file not in here]:
            raise DataError(f"{self.folder} lacks {', '.join(absent)}; download the dataset again")
        try:
            with self._unpacked() as root:
                data = _open(self.name, root, download=False, train=split == "train")
        except (OSError, EOFError, RuntimeError, ValueError, LookupError, AssertionError, zlib.error) as error:
            found = f"{self.folder} is damaged; torchvision says: {first_line(error)}"
            raise DataError(f"{found}: download the dataset again") from error
        images, labels = np.asarray(data.data), np.asarray(data.targets, np.int64)
        if self.name == "cifar10":
            images = images.transpose(0, 3, 1, 2)
        elif self.name == "emnist_letters":
            images, labels = images.transpose(0, 2, 1)[:, None], labels - 1
        else:
            images = images[:, None]
        if images.shape != (len(labels), *shape) or not len(labels):
            found = f"{split} images of {images.shape}, {len(labels)} labels"
            raise DataError(f"{self.folder} holds {found}; need as many, at least one, of {shape}")
        if labels.min() < 0 or labels.max() >= len(self.class_names):
            allowed = f"allowed: 0..{len(self.class_names) - 1} (from 0)"
            raise DataError(f"{self.folder} has {split} labels {labels.min()}..{labels.max()}; {allowed}")
        chosen = slice(None) if rows is None else rows
        return Split(np.ascontiguousarray(images[chosen]), labels[chosen])

    @contextlib.contextmanager
    def _unpacked(self) -> Iterator[Path]:
        """Yield a root with plain files: this one, or a temporary copy if some exist only compressed."""
        if all(path.with_suffix("").exists() for path in self.present() if path.suffix == ".gz"):
            yield self.root
            return
        with tempfile.TemporaryDirectory(prefix="nkat-") as folder:
            target = Path(folder, place(self.name))
            target.mkdir(parents=True)
            for path in self.present():
                if path.suffix != ".gz":
                    shutil.copy(path, target)
                    continue
                with gzip.open(path) as file:
                    data = file.read(_MAX_BYTES + 1)
                if len(data) > _MAX_BYTES:
                    raise OSError(f"{path.name} unpacks to more than {_MAX_BYTES} bytes")
                (target / path.stem).write_bytes(data)
            yield Path(folder)


def open_torchvision(name: str, root: Path) -> TorchvisionFiles:
    """Describe a known dataset under torchvision's root; no file is read."""
    where = f"{root / place(name)} (torchvision's layout)"
    return TorchvisionFiles(where=where, class_names=KNOWN[name].class_names, source=TORCHVISION, name=name, root=root)


def fetch(name: str, *, scratch: Path, notice: Callable[[str], None]) -> Pair:
    """Download a known dataset with torchvision, which checks the archives' MD5, and read it.

    Raises:
        Unavailable: no host answers, or the download failed.
    """
    url = _first_answer(_urls(name))
    notice(f"{name}: downloading with torchvision")
    with tempfile.TemporaryDirectory(dir=scratch, prefix=f".{name}-") as folder:
        try:
            with contextlib.redirect_stderr(io.StringIO()), _socket_timeout(STALL_S):  # the progress bar is not ours
                _open(name, Path(folder), download=True, mirror=url)
            found = open_torchvision(name, Path(folder))
            splits = {split: found.load(split, found.shape()) for split in SPLITS}
        except (OSError, RuntimeError, DataError) as error:
            raise Unavailable(f"torchvision's download failed ({first_line(error)})") from error
    return Pair(splits, found.class_names, TORCHVISION)


def _urls(name: str) -> list[str]:
    from torchvision import datasets

    own = vars(getattr(datasets, CLASSES[name]))
    return list(own["mirrors"]) if "mirrors" in own else [own["url"]]


def _open(name: str, root: Path, *, download: bool, train: bool = True, mirror: str = "") -> Any:
    """Create torchvision's dataset; of several mirrors only `mirror` is used, since another could hang."""
    from torchvision import datasets

    kind: Any = getattr(datasets, CLASSES[name])
    if name == "cifar10" and not download:  # torchvision would refuse these too, but without their names
        official = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
        check = datasets.utils.check_integrity
        if bad := [file for file, md5 in official if not check(root / kind.base_folder / file, md5)]:
            raise RuntimeError(f"not the official MD5: {', '.join(bad)}")
    if mirror and "mirrors" in vars(kind):
        kind = type(CLASSES[name], (kind,), {"mirrors": [mirror]})  # torchvision names the folder after the class
    options = {"split": "letters"} if name == "emnist_letters" else {}
    return kind(root, train=train, download=download, **options)


def _first_answer(urls: list[str]) -> str:
    """Return the URL whose host answers first, within PROBE_S; raise Unavailable if none does."""
    answered: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask(url: str) -> None:
        answered.put(url if answers(url) else None)

    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()  # a daemon is never waited for
    with contextlib.suppress(queue.Empty):
        for _ in urls:
            if found := answered.get(timeout=PROBE_S):
                return found
    raise Unavailable("torchvision's hosts cannot be reached from here")


def answers(url: str) -> bool:
    """Return whether the host of a URL answers; a refusal by a proxy does not count."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_S).close()
    except urllib.error.HTTPError as error:
        return error.code < 500 and error.code not in (403, 407)
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Set a timeout, since torchvision opens its connections without one."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
