"""List, fetch and verify datasets, for `nkat data`. Each function returns one row per dataset."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nkat_ray.config import DataConfig
from nkat_ray.data.cache import Memory, cache_folder
from nkat_ray.data.dataset import SPLIT_WORDS, DataError, Dataset, Missing, Unavailable
from nkat_ray.data.folder import open_folder
from nkat_ray.data.image_folder import visible_folders
from nkat_ray.data.layouts import VARIANTS, find, find_in
from nkat_ray.data.sources import fetch_dataset
from nkat_ray.data.spec import KNOWN, check_name, plain, resembles

State = Literal["present", "verified", "unverified", "missing", "damaged"]
Notice = Callable[[str], None]


@dataclass(frozen=True)
class DatasetRow:
    """The state of one dataset. `present` means found, but not checked by this command."""

    name: str
    state: State
    where: str  # location and source, or the reason why it is missing or damaged
    classes: int | None = None
    train: int | None = None
    test: int | None = None
    digest: str | None = None


def dataset_table(config: DataConfig) -> list[DatasetRow]:
    """List the known datasets, then the user's own, in the data folder or else in the cache; read headers only.

    Raises:
        DataError: the data folder does not exist.
    """
    folder = _folder(config)
    rows = [_peek(name, folder) for name in [*KNOWN, *_own_names(folder)]]
    if all(row.state == "missing" for row in rows):  # perhaps the folder itself is one dataset
        itself = _peek(re.sub(r"[^A-Za-z0-9]+", "_", folder.resolve().name).strip("_") or "data", folder)
        rows += [] if itself.state == "missing" else [itself]
    return rows


def find_datasets(config: DataConfig, names: Sequence[str]) -> list[DatasetRow]:
    """Look for datasets by name where a run does; read headers only.

    Raises:
        DataError: the data folder does not exist.
    """
    if config.data == "synthetic":
        suite = f"the synthetic suite has only {', '.join(KNOWN)}"
        return [DatasetRow(name, "present" if name in KNOWN else "missing", suite) for name in names]
    folder = _folder(config)
    return [_peek(name, folder) for name in names]


def verify(config: DataConfig, names: Sequence[str] = (), *, notice: Notice = lambda _: None) -> list[DatasetRow]:
    """Check datasets again, regardless of earlier results.

    Args:
        names: datasets to check; all that are found if empty.

    Raises:
        DataError: the data folder does not exist or contains no dataset, or a name is not allowed.
    """
    folder = _folder(config)
    wanted = names or [row.name for row in dataset_table(config) if row.state != "missing"]
    if not wanted:
        layouts = "Parquet files, class folders (NAME/train/<class>/*.png), or torchvision's files"
        advice = f"expected: {layouts} (docs/data.md)" if config.data_dir else "`nkat data fetch`, or give --data_dir"
        raise DataError(f"{folder} holds no dataset, so there is nothing to verify; {advice}")
    rows = []
    for name in wanted:
        check_name(name)
        notice(f"checking {name}")
        rows.append(_check(name, folder))
    return rows


def fetch(names: Sequence[str] = (), *, notice: Notice) -> list[DatasetRow]:
    """Fetch datasets into the cache, unless they are there already.

    Args:
        names: datasets to fetch; all known ones if empty.

    Raises:
        DataError: a name is not allowed.
    """
    for name in names:
        check_name(name)
    return [_row(name, fetch_dataset(name, notice=notice)) for name in names or KNOWN]


def _folder(config: DataConfig) -> Path:
    if config.data_dir is not None and not config.data_dir.is_dir():
        raise DataError(f"data folder {config.data_dir} does not exist or is no folder; name one with Parquet files")
    return config.data_dir or cache_folder()


def _own_names(folder: Path) -> list[str]:
    """List the user's own datasets in a folder: files NAME-train.parquet and sub-folders NAME."""
    pattern = re.compile(r"([^.].*?)-(?:train|test)(?:-\d{5}-of-\d{5})?\.parquet")
    entries = folder.iterdir() if folder.is_dir() else []
    names = {match[1] for path in entries if (match := pattern.fullmatch(path.name))}
    part_of_one = {*VARIANTS, *(word for words in SPLIT_WORDS.values() for word in words)}
    for place in visible_folders(folder):
        try:
            if plain(place.name) not in part_of_one and find_in(place, visible_folders(place)):
                names.add(place.name)
        except DataError:  # its row states the problem
            names.add(place.name)
    known = {plain(name) for name in KNOWN}
    return sorted(name for name in names if plain(name) not in known)


def _peek(name: str, folder: Path) -> DatasetRow:
    try:
        check_name(name)
        if not folder.is_dir():
            raise Unavailable(f"not in {folder}")
        layout, is_folder = find(name, folder)
    except Unavailable:
        return DatasetRow(name, "missing", f"not in {folder}")
    except DataError as error:
        return DatasetRow(name, "damaged", str(error))
    classes = len(layout.class_names)
    if is_folder and name in KNOWN and name not in resembles(layout.class_names if layout.named else None, classes):
        return DatasetRow(name, "missing", f"{folder} is another dataset")
    return DatasetRow(name, "present", layout.where, classes, layout.size("train"), layout.size("test"))


def _check(name: str, folder: Path) -> DatasetRow:
    try:
        missing = Missing(name, f"not in {folder}")
        return _row(name, open_folder(name, folder, Memory(cache_folder(), fresh=True)) if folder.is_dir() else missing)
    except DataError as error:
        return DatasetRow(name, "damaged", str(error))


def _row(name: str, found: Dataset | Missing) -> DatasetRow:
    if isinstance(found, Missing):
        return DatasetRow(name, "missing", found.reason)
    state: State = "verified" if found.verified else "unverified"
    return DatasetRow(name, state, found.source, found.classes, found.sizes["train"], found.sizes["test"], found.digest)
