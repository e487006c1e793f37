"""Find the files of a dataset in a folder, in any of the supported layouts.

The search for a dataset NAME tries, in this order:

1. `NAME-{train,test}.parquet`, or numbered shards, in the folder: the project's Parquet layout, or Hugging Face's;
2. a sub-folder NAME: Hugging Face's files in it or in a sub-folder of it, or class folders (`train/<class>/`);
3. torchvision's own layout (`cifar-10-batches-py/`, `MNIST/raw/` and so on);
4. the folder itself, as in 2: a folder that is one dataset.

Names of folders are compared without case and punctuation: `Fashion-MNIST` is `fashion_mnist`.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from nkat_ray.data.dataset import SPLITS, DataError, Layout, SplitName, Unavailable
from nkat_ray.data.image_folder import open_folders, split_folders, visible_folders
from nkat_ray.data.parquet import find_shards, open_shards
from nkat_ray.data.spec import KNOWN, plain
from nkat_ray.data.torchvision_files import open_torchvision, place

VARIANTS: Final = ("data", "plaintext", "default")  # Hugging Face's names for the folder of the only variant


def find(name: str, folder: Path) -> tuple[Layout, bool]:
    """Find a dataset in a folder (module docstring); no image is decoded.

    Returns:
        The layout, and whether the folder itself is that one dataset, so that its name is not certain.

    Raises:
        Unavailable: there is no dataset of that name.
        DataError: the folder does not exist, or its content cannot be used.
    """
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist or is no folder; name one with {name}-train.parquet")
    if shards := find_shards(folder, f"{name}-"):
        _need(folder, shards, need_test=True)
        return open_shards(shards), False
    homes = [sub for sub in visible_folders(folder) if plain(sub.name) == plain(name)]
    for home in homes:
        if layout := find_in(home, visible_folders(home)):
            return layout, False
    if name in KNOWN and open_torchvision(name, folder).present():
        return open_torchvision(name, folder), False
    if layout := find_in(folder, [sub for sub in visible_folders(folder) if plain(sub.name) in VARIANTS]):
        return layout, True
    torchvision = f" or {place(name)} (torchvision)" if name in KNOWN else ""
    expected = (
        f"{name}-{{train,test}}.parquet, {name}/train-00000-of-00001.parquet (Hugging Face), "
        f"{name}/{{train,test}}/<class>/*.png{torchvision}"
    )
    if homes:
        advice = "`nkat data import` takes class folders without train/ and test/"
        raise DataError(f"{homes[0]} holds no dataset; expected: {expected}; {advice}")
    raise Unavailable(f"{folder} holds no {name}; expected: {expected}")


def find_in(folder: Path, inner: Sequence[Path], *, need_test: bool = True) -> Layout | None:
    """Find the only dataset of a folder: Parquet files in it or in one of its `inner` folders, or class folders.

    Raises:
        DataError: there are several datasets, or a split is missing (only `nkat data import` needs no test images).
    """
    found = {folder: shards for folder in (folder, *inner) if (shards := find_shards(folder))}
    if len(found) > 1:
        raise DataError(f"{folder} holds several datasets: {', '.join(map(str, found))}; leave one of them")
    for where, shards in found.items():
        _need(where, shards, need_test=need_test)
        return open_shards(shards)
    if not (folders := split_folders(folder)):
        return None
    _need(folder, folders, need_test=need_test)
    return open_folders(folders)


def _need(folder: Path, found: Collection[SplitName], *, need_test: bool) -> None:
    for split in SPLITS if need_test else ("train",):
        if split not in found:
            advice = "`nkat data import` draws test images from training images"
            raise DataError(f"{folder} holds a {' and '.join(found)} split but none called {split}; {advice}")
