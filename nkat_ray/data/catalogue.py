"""Plain functions behind a data command: list, fetch and verify datasets. Each returns a row a dataset."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nkat_ray.config import DataConfig
from nkat_ray.data import torchvision_layout
from nkat_ray.data.cache import Memory, cache_folder
from nkat_ray.data.dataset import SPLITS, DataError, Dataset, Missing
from nkat_ray.data.folder import open_folder
from nkat_ray.data.parquet import pair_path, read_header
from nkat_ray.data.sources import fetch_dataset
from nkat_ray.data.spec import KNOWN, check_name

State = Literal["present", "verified", "unverified", "missing", "damaged"]
Notice = Callable[[str], None]


@dataclass(frozen=True)
class DatasetRow:
    """What is known of one dataset. `present` means found but not checked by this command."""

    name: str
    state: State
    where: str
    """Place and source of what was found, or why it is missing or damaged."""
    classes: int | None = None
    train: int | None = None
    test: int | None = None
    digest: str | None = None


def dataset_table(config: DataConfig) -> list[DatasetRow]:
    """Known datasets, then own ones, as found in the data folder, or else in the cache. Reads headers only.

    Raises:
        DataError: the data folder does not exist.
    """
    folder = _folder(config)
    return [_peek(name, folder) for name in _names(folder)]


def verify(config: DataConfig, names: Sequence[str] = (), *, notice: Notice = lambda _: None) -> list[DatasetRow]:
    """Check datasets anew, whatever is remembered of them; all that are found when no name is given.

    Raises:
        DataError: the data folder does not exist, or a name is not allowed.
    """
    folder = _folder(config)
    rows = []
    for name in names or [row.name for row in dataset_table(config) if row.state != "missing"]:
        check_name(name)
        notice(f"checking {name}")
        rows.append(_check(name, folder))
    return rows


def fetch(names: Sequence[str] = (), *, notice: Notice) -> list[DatasetRow]:
    """Fetch datasets into the cache (all known ones when no name is given); those that are there stay as they are.

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


def _names(folder: Path) -> list[str]:
    own: set[str] = set()
    for split in SPLITS:
        ending = f"-{split}.parquet"
        own |= {path.name.removesuffix(ending) for path in folder.glob(f"*{ending}")}
    return [*KNOWN, *sorted(name for name in own - set(KNOWN) if name[0] != ".")]


def _peek(name: str, folder: Path) -> DatasetRow:
    train, test = pair_path(folder, name, "train"), pair_path(folder, name, "test")
    if not train.exists() and not test.exists():
        if name in KNOWN and torchvision_layout.present(name, folder):
            return DatasetRow(name, "present", f"{folder / torchvision_layout.place(name)} (torchvision's layout)")
        return DatasetRow(name, "missing", f"not in {folder}")
    try:
        headers = read_header(train), read_header(test)
    except DataError as error:
        return DatasetRow(name, "damaged", str(error))
    where = f"{folder} ({headers[0].source})"
    return DatasetRow(name, "present", where, len(headers[0].class_names), headers[0].rows, headers[1].rows)


def _check(name: str, folder: Path) -> DatasetRow:
    try:
        found = open_folder(name, folder, Memory(cache_folder(), fresh=True)) if folder.is_dir() else None
    except DataError as error:
        return DatasetRow(name, "damaged", str(error))
    return _row(name, found or Missing(name, f"not in {folder}"))


def _row(name: str, found: Dataset | Missing) -> DatasetRow:
    if isinstance(found, Missing):
        return DatasetRow(name, "missing", found.reason)
    state: State = "verified" if found.verified else "unverified"
    return DatasetRow(name, state, found.source, found.classes, found.sizes["train"], found.sizes["test"], found.digest)
