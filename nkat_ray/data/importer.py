"""`nkat data import`: convert image files into a Parquet pair (docs/data.md)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nkat_ray.data.dataset import SPLITS, DataError, Shape, Split, SplitName
from nkat_ray.data.image_folder import ImageFolders, describe, open_folders, visible_folders
from nkat_ray.data.layouts import find_in
from nkat_ray.data.parquet import ParquetFiles, pair_path, write_split
from nkat_ray.data.pictures import Kind, Picture, PictureLayout, common_shape, decode, kinds
from nkat_ray.data.spec import KNOWN, check_name, class_names_of, resembles

LEAST_CONTRAST = 8  # of 255, between the darkest and the brightest value of a channel; below it an image is blank
LEAST_SIDE = 4  # pixels
MOST_ASPECT = 8  # above it the shorter side has fewer than 4 pixels at 32x32


@dataclass(frozen=True)
class ImportSummary:
    """The result of an import."""

    name: str
    class_names: tuple[str, ...]
    shape: Shape
    sizes: dict[SplitName, int]  # images written per split
    source: str  # description of the files that were read
    notes: tuple[str, ...]
    """Notices: files that were left out, images that are probably mistakes, origin of the test images."""
    paths: tuple[Path, Path]  # the training and the test file


def import_folder(
    folder: Path, out_dir: Path, name: str, *, test_fraction: float = 0.2, seed: int = 0, flip: bool | None = None
) -> ImportSummary:
    """Write `<name>-{train,test}.parquet` into `out_dir` from Hugging Face's files or from class folders in `folder`.

    The splits are those of the files; without a test split, test images are drawn per class from the training images,
    at least one of each class. pictures.py describes the conversion.

    Args:
        test_fraction: share of each class that is drawn for the test file, 0 < test_fraction < 1.
        flip: whether a mirrored image still belongs to its class; None: yes for colour, no for grey.

    Raises:
        DataError: bad arguments, existing files, fewer than two classes, a class without images or with black images
            only, an unreadable image, or a known name for other images.
    """
    paths = _check_target(folder, out_dir, name)
    layout = _find(folder)
    class_names = tuple(text.replace(",", ";") for text in class_names_of(name, layout))  # commas separate names
    pictures = {split: layout.pictures(split) for split in SPLITS if layout.files(split)}
    found = {split: kinds(part) for split, part in pictures.items()}
    shape = common_shape([kind for part in found.values() for kind in part])
    if name in KNOWN and name not in resembles(class_names if layout.named else None, len(class_names), shape[0]):
        what = f"{len(class_names)} {'grey' if shape[0] == 1 else 'colour'} classes: {', '.join(class_names[:10])}"
        raise DataError(
            f"name is {name!r}, a dataset that the system knows; these are other images ({what}): rename it"
        )
    splits = {split: Split(decode(part, shape), layout.labels(split)) for split, part in pictures.items()}
    left_out = describe(layout.left_out) if isinstance(layout, ImageFolders) else ""
    notes = [left_out] if left_out else []
    for split, part in pictures.items():
        notes += _odd(part, found[split], splits[split], class_names)
    if "test" not in splits:
        splits = _draw_test(splits["train"], class_names, test_fraction, seed)
        notes.append(f"no test split: {len(splits['test'])} test images were drawn, {test_fraction:.0%} of each class")
    if untested := sorted(set(splits["train"].labels.tolist()) - set(splits["test"].labels.tolist())):
        notes.append(f"no test images of {', '.join(class_names[label] for label in untested)}")
    if twins := len(_pixels(splits["train"]) & _pixels(splits["test"])):
        notes.append(f"{twins} different test images are also training images: accuracies will be too good")
    out_dir.mkdir(parents=True, exist_ok=True)
    for path, split in zip(paths, SPLITS, strict=True):
        source = f"images of folder {folder.resolve().name}"
        write_split(path, splits[split], class_names=class_names, source=source, encoding="png", flip=flip)
    sizes = {split: len(splits[split]) for split in SPLITS}
    return ImportSummary(name, class_names, shape, sizes, layout.where, tuple(notes), paths)


def _check_target(folder: Path, out_dir: Path, name: str) -> tuple[Path, Path]:
    check_name(name)
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist or is no folder; name one with a sub-folder for each class")
    train, test = pair_path(out_dir, name, "train"), pair_path(out_dir, name, "test")
    for path in (train, test):
        if path.exists():
            raise DataError(f"{path} exists; remove it, or choose another name")
    return train, test


def _find(folder: Path) -> PictureLayout:
    layout = find_in(folder, visible_folders(folder), need_test=False) or open_folders({"train": folder})
    if not isinstance(layout, PictureLayout) or (isinstance(layout, ParquetFiles) and layout.description.stated):
        raise DataError(f"{layout.where}: these files need no import; use them with --data_dir")
    return layout


def _odd(pictures: Sequence[Picture], found: Sequence[Kind], split: Split, class_names: Sequence[str]) -> list[str]:
    """Describe images that are probably mistakes; raise a DataError if all images of a class are black."""
    brightest = split.images.reshape(len(split), -1).max(axis=1)
    for label in np.unique(split.labels):
        if brightest[split.labels == label].max() < LEAST_CONTRAST:
            example = pictures[int(np.flatnonzero(split.labels == label)[0])][1]
            advice = "16-bit files with small values, or transparent ones? Convert them to 8 bits per channel first"
            raise DataError(f"every image of class {class_names[label]} is black, e.g. {example}; {advice}")
    pixels = split.images.reshape(*split.images.shape[:2], -1)
    contrast = np.ptp(pixels, axis=2).max(axis=1)  # of the channel where it is largest
    sides = np.array([(width, height) for _, width, height in found])
    strip = (sides.min(axis=1) < LEAST_SIDE) | (sides.max(axis=1) > MOST_ASPECT * sides.min(axis=1))
    notes = []
    for odd, what in (
        ((contrast < LEAST_CONTRAST) & ~strip, "show nothing but one colour"),
        (strip, f"are narrower than {LEAST_SIDE} pixels, or than 1/{MOST_ASPECT} of their length"),
    ):
        if odd.any():
            row = int(np.argmax(odd))
            example = f"{pictures[row][1]} ({sides[row][0]}x{sides[row][1]})"
            notes.append(f"{odd.sum()} of {len(odd)} images {what}, e.g. {example}")
    return notes


def _pixels(split: Split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


def _draw_test(split: Split, class_names: Sequence[str], fraction: float, seed: int) -> dict[SplitName, Split]:
    """Draw test images per class, at least one of each; the rest are training images."""
    generator = np.random.default_rng(seed)
    counts = np.bincount(split.labels, minlength=len(class_names))
    if few := [f"{name} ({count})" for name, count in zip(class_names, counts, strict=True) if count < 2]:
        raise DataError(f"classes with fewer than 2 images: {', '.join(few)}; needed: one to train and one to test")
    is_test = np.zeros(len(split), np.bool_)
    for label, count in enumerate(counts):
        rows = generator.permutation(np.flatnonzero(split.labels == label))
        is_test[rows[: min(max(round(count * fraction), 1), count - 1)]] = True
    return {
        "train": Split(split.images[~is_test], split.labels[~is_test]),
        "test": Split(split.images[is_test], split.labels[is_test]),
    }
