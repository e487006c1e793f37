"""What every source of images delivers: `Dataset`, `Split`, `Missing`, and the one error, `DataError`."""

import re
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

SplitName = Literal["train", "test"]
SPLITS: tuple[SplitName, SplitName] = ("train", "test")

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


class DataError(ValueError):
    """Data that is damaged, inconsistent or not allowed. One line: what, where, what to do."""


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, C, H, W), C 1 or 3, H and W 1..32, contiguous; labels int64 (N,), from 0."""

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Missing:
    """A dataset that could not be had, and why (for people)."""

    name: str
    reason: str


class Reader(Protocol):
    """Reads the splits of one dataset from one place. Readers are picklable and hold no images."""

    def load(self, split: SplitName, rows: Labels | None = None) -> Split:
        """Decode the images at `rows` (all when None), in that order."""
        ...

    def labels(self, split: SplitName) -> Labels:
        """All labels of the split, without decoding images."""
        ...


@dataclass(frozen=True)
class Dataset:
    """A dataset that was found and checked. It holds no images: `load` decodes them afresh."""

    name: str
    class_names: tuple[str, ...]
    grey: bool
    """One channel: colour normalisation is bypassed (spec section 3)."""
    flip: bool
    """A mirrored image is still of its class: augmentation may flip it."""
    source: str
    """Where the images come from, for people; ends in ", unverified" where no digest was known."""
    digest: str
    """`sha256:` over the decoded images and labels of both splits: the same for every encoding and source."""
    verified: bool
    """The content equals a known release, or the digests listed beside the files."""
    sizes: dict[str, int]
    """Images in each split: train, test."""
    reader: Reader = field(repr=False, compare=False)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def load(self, split: SplitName, rows: Labels | None = None) -> Split:
        """Decode a split, or only its `rows` (int64 indices into it, in that order).

        Raises:
            DataError: the files were damaged since they were checked.
        """
        return self.reader.load(split, rows)

    def labels(self, split: SplitName) -> Labels:
        """The labels of a split, int64 (N,), without decoding its images."""
        return self.reader.labels(split)


@dataclass(frozen=True)
class Pair:
    """Both splits decoded, on their way into the cache."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    source: str

    def split(self, name: SplitName) -> Split:
        """The split called `name`."""
        return self.train if name == "train" else self.test


def first_line(error: BaseException | str) -> str:
    """The first line of an error, for a message of one line; addresses are left out, as they may end up in results."""
    text = str(error).strip() or type(error).__name__
    return re.sub(r"\w+://\S+|(?<=')[\w-]+(\.[\w-]+)+(?=')", "its address", text.splitlines()[0])[:160].strip()


class Unavailable(Exception):
    """A source that cannot deliver here and now; its text says why. Never leaves this package."""
