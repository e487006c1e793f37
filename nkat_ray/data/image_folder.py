"""Read folders of image files, one sub-folder per class, as in torchvision's ImageFolder.

With splits: `train/<class>/<image>` and `test/<class>/<image>`. Without: `<class>/<image>`, from which `nkat data
import` draws test images.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nkat_ray.data.dataset import SPLIT_WORDS, DataError, Labels, SplitName
from nkat_ray.data.pictures import Picture, PictureLayout, suffixes


@dataclass(frozen=True, kw_only=True)
class ImageFolders(PictureLayout):
    """A dataset as folders of image files."""

    images: Mapping[SplitName, tuple[tuple[Path, int], ...]]  # each image file with its label
    left_out: Mapping[str, int]  # kind of file -> number of files that are not used

    def files(self, split: SplitName) -> tuple[Path, ...]:
        """List the image files of a split, class by class."""
        return tuple(path for path, _ in self.images.get(split, ()))

    def size(self, split: SplitName) -> int:
        """Count the images of a split."""
        return len(self.images[split])

    def labels(self, split: SplitName) -> Labels:
        """Read all labels of a split, int64 (N,), from the class folders."""
        return np.array([label for _, label in self.images[split]], np.int64)

    def pictures(self, split: SplitName, rows: Labels | None = None) -> list[Picture]:
        """Return the image files at `rows` (all when None)."""
        files = self.files(split)
        return [(path, str(path)) for path in (files if rows is None else [files[row] for row in rows])]


def describe(left_out: Mapping[str, int]) -> str:
    """Describe the files that were left out; empty if there are none."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()) if count)
    return kinds and f"{sum(left_out.values())} left out: {kinds}"


def visible_folders(folder: Path) -> list[Path]:
    """List sub-folders in alphabetical order, without those that operating systems create (`.x`, `__x`)."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [entry for entry in entries if entry.is_dir() and not entry.name.startswith((".", "__"))]


def split_folders(folder: Path) -> dict[SplitName, Path]:
    """Find the folders of splits with class folders; empty if the sub-folders are classes themselves.

    Raises:
        DataError: there are folders such as `train` and `test`, but without class folders.
    """
    by_name = {path.name.lower(): path for path in visible_folders(folder)}
    with_classes = {name: path for name, path in by_name.items() if visible_folders(path)}
    found: dict[SplitName, Path] = {}
    for split, words in SPLIT_WORDS.items():
        if name := next((word for word in words if word in with_classes), None):
            found[split] = with_classes[name]
    only_splits = bool(by_name) and set(by_name) <= {word for words in SPLIT_WORDS.values() for word in words}
    if "train" in found and (len(found) == len(SPLIT_WORDS) or only_splits):
        return found
    if only_splits:
        raise DataError(f"{folder} holds {', '.join(by_name)} without class folders; expected: train/<class>/<image>")
    return {}


def open_folders(folders: Mapping[SplitName, Path]) -> ImageFolders:
    """Describe image files in class folders; no image is opened.

    Raises:
        DataError: fewer than two classes, a class without a training image, or other classes among the test images.
    """
    class_names = tuple(path.name for path in visible_folders(folders["train"]))
    if len(class_names) < 2:
        found = f"{folders['train']} has {len(class_names)} sub-folders"
        inner = f"; do you mean {folders['train'] / class_names[0]}?" if class_names else ""
        raise DataError(f"{found}; needed: one for each of at least two classes{inner}")
    images: dict[SplitName, tuple[tuple[Path, int], ...]] = {}
    left_out: Counter[str] = Counter()
    for split, folder in folders.items():
        names = [path.name for path in visible_folders(folder)]
        if strange := sorted(set(names) - set(class_names)):
            raise DataError(f"{folder} has the classes {', '.join(strange)}, which {folders['train']} lacks; add them")
        for entry in folder.iterdir():
            if entry.name not in names:
                left_out["hidden" if entry.name[0] == "." else "outside the class folders"] += 1
        files = [(path, class_names.index(name)) for name in names for path in _image_files(folder / name, left_out)]
        images[split] = tuple(files)
    empty = set(range(len(class_names))) - {label for _, label in images["train"]}
    if empty:
        names = [class_names[label] for label in sorted(empty)]
        readable = f"can be read: {' '.join(sorted(suffixes()))}"
        found = f"{folders['train']}: no images in {', '.join(names)}; {describe(left_out) or 'they are empty'}"
        raise DataError(f"{found}; {readable}: convert the images, or remove the folders")
    places = " and ".join(map(str, folders.values()))
    where = f"{places} ({'; '.join(filter(None, ('class folders', describe(left_out))))})"
    return ImageFolders(where=where, class_names=class_names, images=images, left_out=left_out)


def _image_files(folder: Path, left_out: Counter[str]) -> list[Path]:
    """Find the image files in a class folder, in alphabetical order; count the others by their kind."""

    def fail(error: OSError) -> None:
        raise error

    found, readable = [], suffixes()
    for place, folders, files in os.walk(folder, onerror=fail):
        left_out["linked folder"] += sum(Path(place, name).is_symlink() for name in folders)
        for path in (Path(place, name) for name in files):
            if path.suffix.lower() in readable and path.name[0] != "." and path.is_file():
                found.append(path)
            else:
                left_out[_kind(path)] += 1
    return sorted(found)


def _kind(path: Path) -> str:
    if path.name[0] == ".":
        return "hidden"
    if not path.exists():
        return "dead link"
    return path.suffix.lower() if path.is_file() and path.suffix else "other"
