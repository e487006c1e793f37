"""A folder of images, one sub-folder a class, becomes a Parquet pair (docs/data.md)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nkat_ray.data.dataset import DataError, Images, Labels, Split, first_line
from nkat_ray.data.parquet import pair_path, write_split
from nkat_ray.data.spec import KNOWN, MAX_SIZE, check_name

_GREY_MODES: Final = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I", "F")


@dataclass(frozen=True)
class ImportSummary:
    """What an import made."""

    name: str
    class_names: tuple[str, ...]
    grey: bool
    height: int
    width: int
    train: int
    """Images written to the training file."""
    test: int
    skipped: tuple[str, ...]
    """Files that are no images by their suffix, relative to the folder."""
    paths: tuple[Path, Path]
    """The training and the test file."""


def import_folder(
    folder: Path, out_dir: Path, name: str, *, test_fraction: float = 0.2, seed: int = 0, flip: bool | None = None
) -> ImportSummary:
    """Write `<name>-{train,test}.parquet` into `out_dir` from `folder`/<class>/<image>.

    Images are turned upright by their EXIF tag, transparency becomes black, and the file is grey only if every image
    is. When all images have one size of at most 32x32 they are kept as they are; otherwise each is resized to fit into
    32x32 with its aspect kept, and padded with black. The test images are drawn by class, at least one of each.

    Args:
        test_fraction: share of each class that goes into the test file, 0 < test_fraction < 1.
        flip: whether a mirrored image is still of its class; None: yes for colour, no for grey.

    Raises:
        DataError: bad arguments, fewer than two classes, a class with one image, an unreadable image, or files there
            already.
    """
    paths = _check_target(folder, out_dir, name, test_fraction)
    classes = _classes(folder)
    files, skipped = _image_files(folder, classes)
    labels = np.array([classes.index(file.relative_to(folder).parts[0]) for file in files], np.int64)
    images = _read_all(files)
    is_test = _choose_test(labels, len(classes), test_fraction, seed)
    out_dir.mkdir(parents=True, exist_ok=True)
    for path, chosen in zip(paths, (~is_test, is_test), strict=True):
        split = Split(images[chosen], labels[chosen])
        source = f"images of folder {folder.resolve().name}"
        write_split(path, split, class_names=classes, source=source, encoding="png", flip=flip)
    _, channels, height, width = images.shape
    test = int(is_test.sum())
    return ImportSummary(name, classes, channels == 1, height, width, len(labels) - test, test, skipped, paths)


def _check_target(folder: Path, out_dir: Path, name: str, test_fraction: float) -> tuple[Path, Path]:
    check_name(name)
    if name in KNOWN:
        raise DataError(f"name is {name!r}, a dataset that the system knows; give your own data another name")
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction is {test_fraction}; allowed: 0 < test_fraction < 1")
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist or is no folder; name one with a sub-folder for each class")
    train, test = pair_path(out_dir, name, "train"), pair_path(out_dir, name, "test")
    for path in (train, test):
        if path.exists():
            raise DataError(f"{path} exists; remove it, or choose another name")
    return train, test


def _classes(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))
    if len(names) < 2:
        raise DataError(f"{folder} has {len(names)} sub-folders; needed: one for each of at least two classes")
    for name in names:
        if "," in name:
            raise DataError(f"{folder / name}: a class name must not hold a comma; rename the folder")
    return names


def _image_files(folder: Path, classes: Sequence[str]) -> tuple[list[Path], tuple[str, ...]]:
    """Image files in a fixed order, and what was skipped."""
    suffixes = Image.registered_extensions()
    files, skipped = [], []
    for name in classes:
        found = sorted(path for path in (folder / name).rglob("*") if path.is_file() and path.name[0] != ".")
        images = [path for path in found if path.suffix.lower() in suffixes]
        skipped += [str(path.relative_to(folder)) for path in found if path.suffix.lower() not in suffixes]
        if len(images) < 2:
            found_text = f"{folder / name} holds {len(images)} images"
            raise DataError(f"{found_text}; needed: at least 2, one to train and one to test")
        files += images
    return files, tuple(skipped)


def _read_all(files: Sequence[Path]) -> Images:
    """(N, C, H, W): C is 1 only if all are grey."""
    modes, sizes = zip(*(_mode_and_size(file) for file in files), strict=True)
    mode = "L" if all(mode in _GREY_MODES for mode in modes) else "RGB"
    uniform = len(set(sizes)) == 1 and max(sizes[0]) <= MAX_SIZE
    width, height = sizes[0] if uniform else (MAX_SIZE, MAX_SIZE)
    images = np.empty((len(files), 1 if mode == "L" else 3, height, width), np.uint8)
    for row, file in enumerate(files):
        pixels = np.asarray(_fit(_open(file, mode), (width, height)))
        images[row] = pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
    return images


def _mode_and_size(file: Path) -> tuple[str, tuple[int, int]]:
    """Mode and upright size, without decoding."""
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5..8 swap the sides
            return image.mode, (image.height, image.width) if turned else image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} is no readable image ({first_line(error)}); remove or replace it") from error


def _open(file: Path, mode: str) -> Image.Image:
    try:
        with Image.open(file) as opened:
            opened.draft(mode, (2 * MAX_SIZE, 2 * MAX_SIZE))  # large JPEGs are decoded at a fraction of their size
            return _to_mode(ImageOps.exif_transpose(opened), mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} is no readable image ({first_line(error)}); remove or replace it") from error


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """8 bits a channel, transparency over black."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image, np.int64).clip(0, 65535) >> 8).astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert(mode)
    return image.convert(mode)


def _fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else ImageOps.pad(image, size, Image.Resampling.LANCZOS)


def _choose_test(labels: Labels, classes: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """True where an image goes into the test file."""
    generator = np.random.default_rng(seed)
    is_test = np.zeros(len(labels), np.bool_)
    for label in range(classes):
        rows = generator.permutation(np.flatnonzero(labels == label))
        is_test[rows[: min(max(round(len(rows) * fraction), 1), len(rows) - 1)]] = True
    return is_test
