"""The four datasets of docs/spec.md section 2: classes, colour, flip rule, and the digests of their releases.

datasets.toml contains them.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nkat_ray.data.dataset import SPLITS, DataError, Layout, SplitName

MAX_SIZE: Final = 32  # pixels per side
TORCHVISION: Final = "torchvision download"  # source text of a dataset from torchvision


@dataclass(frozen=True)
class Release:
    """The known content of one dataset."""

    sources: Sequence[str]  # texts of a file's `source` metadata that claim this release
    sizes: Mapping[SplitName, int]
    files: Mapping[SplitName, str]  # SHA-256 of the known Parquet files
    contents: Mapping[SplitName, str]  # SHA-256 of the decoded splits


@dataclass(frozen=True)
class Known:
    """A dataset that the system knows by name."""

    class_names: tuple[str, ...]
    grey: bool
    flip: bool
    size: int  # pixels per side
    release: Release

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return 1 if self.grey else 3


def _read(entry: dict[str, Any]) -> Known:
    fixed = {"class_names": tuple(entry["class_names"]), "release": Release(**entry["release"])}
    return Known(**{**entry, **fixed})


_TABLE = tomllib.loads((Path(__file__).parent / "datasets.toml").read_text(encoding="utf-8"))
KNOWN: Final[Mapping[str, Known]] = {name: _read(entry) for name, entry in _TABLE.items()}


def identify_file(sha256: str) -> str | None:
    """Return the SHA-256 of the content of the known Parquet file with this SHA-256, or None."""
    releases = (known.release for known in KNOWN.values())
    digests = {file: release.contents[split] for release in releases for split, file in release.files.items()}
    return digests.get(sha256)


def identify_content(sha256: str) -> tuple[str, SplitName] | None:
    """Return the dataset and split whose known content has this SHA-256, or None."""
    names = {known.release.contents[split]: (name, split) for name, known in KNOWN.items() for split in SPLITS}
    return names.get(sha256)


def claimed_release(name: str, source: str, rows: int, split: SplitName) -> str | None:
    """Return the dataset whose release a file claims to be, by its source text and its number of images.

    A subset (fewer images) claims nothing, since its digest cannot be known. What came from torchvision claims to be
    the dataset under whose name it is stored.
    """
    by_source = [known for known in KNOWN if source in KNOWN[known].release.sources]
    candidates = [name] if source == TORCHVISION and name in KNOWN else by_source
    return next((known for known in candidates if rows == KNOWN[known].release.sizes[split]), None)


def plain(text: str) -> str:
    """Reduce a name to lower-case letters and digits, so that `Fashion-MNIST` equals `fashion_mnist`."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def resembles(class_names: Sequence[str] | None, classes: int, channels: int | None = None) -> list[str]:
    """List the known datasets that a dataset of unknown name may be, by its classes and its colour.

    EMNIST letters may have its first 12 classes only.

    Args:
        class_names: names of the classes; if None or empty, only their number counts.
        channels: number of channels; if None, both grey and colour match.
    """
    wanted = class_names and [plain(name) for name in class_names]
    return [
        name
        for name, known in KNOWN.items()
        if channels in (None, known.channels)
        and 10 <= classes <= len(known.class_names)
        and (not wanted or wanted == [plain(name) for name in known.class_names[:classes]])
    ]


def class_names_of(name: str, layout: Layout) -> tuple[str, ...]:
    """Return the names of a dataset's classes; those of a known dataset if its files only number them."""
    known = KNOWN[name].class_names if name in KNOWN else ()
    return known[: len(layout.class_names)] if known and not layout.named else layout.class_names


def check_name(name: str) -> None:
    """Refuse (DataError) a dataset's name that is not a plain file name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or ".." in name:
        rule = "1..64 letters, digits, '.', '_' or '-', starting with a letter or digit"
        raise DataError(f"dataset name is {name!r}; allowed: {rule}")
