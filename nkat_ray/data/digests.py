"""Digests of files and of decoded images, and the official digests of the original releases."""

import hashlib
import struct
from pathlib import Path

import numpy as np

from nkat_ray.data.dataset import Split

CIFAR_BATCH = 10_000  # images in each of CIFAR-10's six official batch files


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(split: Split) -> str:
    """SHA-256 of a decoded split: its shape, the pixels (N, C, H, W), the labels as little-endian int64."""
    digest = hashlib.sha256("{},{},{},{}\n".format(*split.images.shape).encode())
    digest.update(np.ascontiguousarray(split.images).data)
    digest.update(np.ascontiguousarray(split.labels, dtype="<i8").data)
    return digest.hexdigest()


def dataset_digest(train: str, test: str) -> str:
    """One digest for a dataset from the content digests of its two splits."""
    return "sha256:" + hashlib.sha256(f"{train}\n{test}\n".encode()).hexdigest()


def idx_bytes(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    """The bytes of an MNIST idx file (magic number, big-endian sizes, uint8 values)."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def cifar_sha1(split: Split) -> tuple[str, ...]:
    """SHA-1 of each official binary batch: a label byte and 3,072 planar bytes an image, 10,000 images a batch."""
    records = np.concatenate([split.labels.astype(np.uint8)[:, None], split.images.reshape(len(split), -1)], axis=1)
    return tuple(hashlib.sha1(records[i : i + CIFAR_BATCH].data).hexdigest() for i in range(0, len(split), CIFAR_BATCH))


def idx_md5(split: Split) -> tuple[str, ...]:
    """MD5 of the two official idx files, unpacked: images, labels."""
    arrays = split.images[:, 0], split.labels.astype(np.uint8)
    return tuple(hashlib.md5(idx_bytes(array)).hexdigest() for array in arrays)
