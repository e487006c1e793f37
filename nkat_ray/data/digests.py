"""Digests of files and of decoded images."""

import hashlib
from pathlib import Path

import numpy as np

from nkat_ray.data.dataset import Split


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(split: Split) -> str:
    """Compute the SHA-256 of a decoded split: its shape, pixels (N, C, H, W), and labels as little-endian int64."""
    digest = hashlib.sha256("{},{},{},{}\n".format(*split.images.shape).encode())
    digest.update(np.ascontiguousarray(split.images).data)
    digest.update(np.ascontiguousarray(split.labels, dtype="<i8").data)
    return digest.hexdigest()


def dataset_digest(train: str, test: str) -> str:
    """Combine the content digests of both splits into the digest of a dataset."""
    return "sha256:" + hashlib.sha256(f"{train}\n{test}\n".encode()).hexdigest()
