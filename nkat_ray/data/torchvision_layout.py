"""Reads the files that torchvision leaves on disk, without torchvision (importing it would load torch).

CIFAR-10: `cifar-10-batches-py/` (pickles: opened only when their MD5 is the official one). The MNIST family: idx
files, plain or gzip, in `MNIST/raw`, `FashionMNIST/raw` and `EMNIST/raw` (the letters split: labels from 1, images
transposed).
"""

import gzip
import hashlib
import io
import pickle
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from nkat_ray.data.dataset import DataError, Images, Labels, Split, SplitName
from nkat_ray.data.spec import KNOWN

_CIFAR_FOLDER: Final = "cifar-10-batches-py"
CIFAR_MD5: Final[dict[SplitName, dict[str, str]]] = {
    "train": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
}
_IDX_FOLDER: Final = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw", "emnist_letters": "EMNIST/raw"}
_MAX_IDX_BYTES: Final = 256 << 20  # the largest, EMNIST letters, has 98 MB


def place(name: str) -> str:
    """The dataset's folder, relative to torchvision's root."""
    return _CIFAR_FOLDER if name == "cifar10" else _IDX_FOLDER[name]


def present(name: str, root: Path) -> bool:
    """Whether any file of the dataset is there."""
    folder = root / place(name)
    return any((folder / file).exists() or (folder / f"{file}.gz").exists() for file in _files(name))


def _files(name: str) -> list[str]:
    if name == "cifar10":
        return [file for batches in CIFAR_MD5.values() for file in batches]
    return [file for split in ("train", "test") for file in idx_names(name, split)]


def idx_names(name: str, split: str) -> tuple[str, str]:
    """Names of the image and label files of a split."""
    stem = "train" if split == "train" else "t10k"
    if name == "emnist_letters":
        stem = f"emnist-letters-{split}"
    return f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"


@dataclass(frozen=True)
class TorchvisionReader:
    """Reads one dataset of a torchvision root."""

    root: Path
    name: str

    def load(self, split: SplitName, rows: Labels | None = None) -> Split:
        """Decode the images at `rows` (all when None).

        Raises:
            DataError: a file is missing, cut short or not what it should be.
        """
        folder = self.root / place(self.name)
        whole = _read_cifar(folder, split) if self.name == "cifar10" else _read_idx_pair(folder, self.name, split)
        return whole if rows is None else Split(whole.images[rows], whole.labels[rows])

    def labels(self, split: SplitName) -> Labels:
        """All labels of the split."""
        if self.name == "cifar10":
            return self.load(split).labels
        _, file = idx_names(self.name, split)
        return _shift(self.name, parse_idx(_read_file(self.root / place(self.name), file), file))


def _read_cifar(folder: Path, split: SplitName) -> Split:
    batches = [_read_batch(folder / file, md5) for file, md5 in CIFAR_MD5[split].items()]
    images = np.concatenate([images for images, _ in batches])
    return Split(images, np.concatenate([labels for _, labels in batches]))


def _read_batch(path: Path, md5: str) -> tuple[Images, Labels]:
    data = _read_file(path.parent, path.name)
    found = hashlib.md5(data).hexdigest()
    if found != md5:
        raise DataError(f"{path} has MD5 {found}, expected {md5}; it is damaged: download it again")
    batch = pickle.loads(data, encoding="latin1")  # only now: the digest says that it is the official file
    return np.ascontiguousarray(batch["data"].reshape(-1, 3, 32, 32)), np.asarray(batch["labels"], np.int64)


def _read_file(folder: Path, file: str) -> bytes:
    """The bytes of a file, unpacked when only its .gz is there."""
    plain, packed = folder / file, folder / f"{file}.gz"
    try:
        if plain.exists() or not packed.exists():
            return plain.read_bytes()
        return gunzip(packed.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{plain} is missing beside the dataset's other files; download the dataset again") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{folder / file} cannot be read ({error}); it is damaged: download it again") from error


def gunzip(data: bytes) -> bytes:
    """Unpack gzip, refusing to grow beyond any idx file.

    Raises:
        OSError, EOFError, zlib.error: damaged or too large.
    """
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        plain = file.read(_MAX_IDX_BYTES + 1)
    if len(plain) > _MAX_IDX_BYTES:
        raise OSError(f"unpacks to more than {_MAX_IDX_BYTES} bytes")
    return plain


def _read_idx_pair(folder: Path, name: str, split: SplitName) -> Split:
    image_file, label_file = idx_names(name, split)
    images = parse_idx(_read_file(folder, image_file), str(folder / image_file))
    labels = parse_idx(_read_file(folder, label_file), str(folder / label_file))
    return idx_split(name, images, labels, where=str(folder / image_file))


def parse_idx(data: bytes, where: str) -> Images:
    """The uint8 array of an idx file's bytes.

    Raises:
        DataError: no idx file of uint8, or cut short.
    """
    dims = data[3] if len(data) >= 4 else 0
    if data[:3] != b"\0\0\x08" or dims not in (1, 3) or len(data) < 4 + 4 * dims:
        raise DataError(f"{where} is no idx file of uint8; it is damaged: download it again")
    shape = struct.unpack(f">{dims}I", data[4 : 4 + 4 * dims])
    found, expected = len(data) - 4 - 4 * dims, int(np.prod(shape, dtype=object))
    if found != expected:
        raise DataError(f"{where} holds {found} values, its header says {expected}; it is damaged: download it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def idx_split(name: str, images: Images, labels: Images, *, where: str) -> Split:
    """A split from the arrays of its two idx files, upright and with labels from 0.

    Raises:
        DataError: the counts differ, or a label or size is out of range.
    """
    size, classes = KNOWN[name].size, len(KNOWN[name].class_names)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(images):
        raise DataError(f"{where} holds {images.shape} images, {labels.shape} labels; need as many, at least one")
    if images.shape[1:] != (size, size):
        raise DataError(f"{where} holds {images.shape[1]}x{images.shape[2]} images; {name} has {size}x{size}")
    shifted = _shift(name, labels)
    if shifted.min() < 0 or shifted.max() >= classes:
        raise DataError(f"{where} has labels {shifted.min()}..{shifted.max()}; allowed: 0..{classes - 1} (from 0)")
    upright = images.transpose(0, 2, 1) if name == "emnist_letters" else images
    return Split(np.ascontiguousarray(upright[:, None]), shifted)


def _shift(name: str, labels: Images) -> Labels:
    """Labels from 0: EMNIST letters count from 1."""
    return labels.astype(np.int64) - (1 if name == "emnist_letters" else 0)
