"""The types that all sources of images share: `Dataset`, `Split`, `Missing`, and the error for bad data `DataError`."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from nkat_ray.errors import UserError

SplitName = Literal["train", "test"]
SPLITS: tuple[SplitName, SplitName] = ("train", "test")
# Names of the splits in files and folders, in order of preference.
SPLIT_WORDS: Mapping[SplitName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "testing", "validation", "valid", "val"),
}

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Shape = tuple[int, int, int]  # channels (1 or 3), height and width (1..32) of every image


class DataError(UserError):
    """Data that are damaged, inconsistent or not allowed; the message is one line with what, where and a remedy."""


class Unavailable(Exception):
    """A source that does not have a dataset or cannot deliver it; the text states why. Internal to this package."""


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, C, H, W), C 1 or 3, H and W 1..32, contiguous; labels int64 (N,), from 0."""

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Missing:
    """A dataset that no source delivers, with the reason as text."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Traits:
    """The properties of a dataset that a training needs besides its images."""

    name: str
    num_classes: int
    grey: bool
    flip: bool


class Reader(Protocol):
    """Read the splits of one dataset from one place. Readers are picklable and keep no images."""

    def load(self, split: SplitName, rows: Labels | None = None) -> Split:
        """Decode the images at `rows` (all when None), in that order."""
        ...

    def labels(self, split: SplitName) -> Labels:
        """Read all labels of a split, without decoding its images."""
        ...


@dataclass(frozen=True, kw_only=True)
class Layout(ABC):
    """A dataset as its files describe it, before any check. Layouts are picklable and keep no images."""

    where: str  # location of the files, for messages
    class_names: tuple[str, ...]  # names of the classes, in the order of the labels
    named: bool = True  # whether the files state the names of the classes; else the names are numbers
    flip: bool | None = None  # whether images may be mirrored; None if the files do not state it
    source: str = ""  # origin of the images, as the files state it

    @abstractmethod
    def files(self, split: SplitName) -> tuple[Path, ...]:
        """List the files of a split."""

    @abstractmethod
    def size(self, split: SplitName) -> int | None:
        """Count the images of a split; None if that requires reading the files."""

    @abstractmethod
    def shape(self) -> Shape:
        """Return the common shape of all images."""

    @abstractmethod
    def labels(self, split: SplitName) -> Labels:
        """Read all labels of a split, int64 (N,).

        Raises:
            DataError: a label is missing or out of range.
        """

    @abstractmethod
    def load(self, split: SplitName, shape: Shape, rows: Labels | None = None) -> Split:
        """Decode the images at `rows` (all when None), in that order.

        Raises:
            DataError: an image cannot be read, or differs from the description in the files.
        """


@dataclass(frozen=True)
class Dataset:
    """A dataset that was found and checked. It keeps no images: `load` decodes them at every call."""

    name: str
    class_names: tuple[str, ...]
    grey: bool  # whether images have one channel, so that colour normalisation is bypassed (docs/spec.md section 3)
    flip: bool  # whether a mirrored image still belongs to its class, so that augmentation may mirror it
    source: str  # origin of the images, for messages; ends in ", unverified" if no digest was known
    digest: str  # `sha256:` over the decoded images and labels of both splits: the same for every encoding and source
    verified: bool  # whether the content equals a known release, or the digests listed beside the files
    sizes: Mapping[SplitName, int]  # number of images per split
    reader: Reader = field(repr=False, compare=False)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def traits(self) -> Traits:
        """The properties that a training needs besides the images."""
        return Traits(name=self.name, num_classes=self.classes, grey=self.grey, flip=self.flip)

    def load(self, split: SplitName, rows: Labels | None = None) -> Split:
        """Decode a split, or only its `rows` (int64 indices into it, in that order).

        Raises:
            DataError: the files have been damaged since they were checked.
        """
        return self.reader.load(split, rows)

    def labels(self, split: SplitName) -> Labels:
        """Read the labels of a split, int64 (N,), without decoding its images."""
        return self.reader.labels(split)


@dataclass(frozen=True)
class Pair:
    """Both splits, decoded, to be written as a Parquet pair."""

    splits: Mapping[SplitName, Split]
    class_names: tuple[str, ...]
    source: str


def first_line(error: BaseException | str) -> str:
    """Shorten an error to its first line, at most 160 characters, without URLs, since messages may enter results."""
    text = str(error).strip() or type(error).__name__
    return re.sub(r"\w+://\S+|(?<=')[\w-]+(\.[\w-]+)+(?=')", "its address", text.splitlines()[0])[:160].strip()
