"""Finds and checks a dataset in a folder: the Parquet pair, or torchvision's own layout.

How a file is judged:

1. Unreadable, inconsistent or out of range (columns, metadata, labels, image sizes): damaged.
2. Listed in the folder's `SHA256SUMS` (optional) with another digest: damaged.
3. A known Parquet file (by SHA-256), or decoded content equal to a known release: verified. Known content under the
   name of another known dataset, or of the other split: damaged, since training on test images must not happen by a
   slip.
4. Otherwise, a file that claims a known release, by its `source` text together with that release's number of images
   (in torchvision's layout: by its place and that number), is damaged: its digest is wrong.
5. Anything else is used: `verified` if SHA256SUMS listed both files, else "unverified". That includes a subset of a
   known release, since no digest of it can be known.

Damaged is a `DataError`. Checks that ended well are remembered (`cache.Memory`).
"""

from dataclasses import dataclass
from pathlib import Path

from nkat_ray.data import torchvision_layout
from nkat_ray.data.cache import Check, Memory
from nkat_ray.data.dataset import SPLITS, DataError, Dataset, Labels, Reader, Split, SplitName
from nkat_ray.data.digests import content_sha256, dataset_digest, file_sha256
from nkat_ray.data.parquet import Header, pair_path, read_header, read_labels, read_split
from nkat_ray.data.spec import KNOWN, claimed_release, identify_content, identify_file

SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class ParquetReader:
    """Reads a Parquet pair."""

    folder: Path
    name: str

    def load(self, split: SplitName, rows: Labels | None = None) -> Split:
        """Decode the images at `rows` (all when None)."""
        return read_split(read_header(pair_path(self.folder, self.name, split)), rows)

    def labels(self, split: SplitName) -> Labels:
        """All labels of the split."""
        return read_labels(read_header(pair_path(self.folder, self.name, split)))


def open_folder(name: str, folder: Path, memory: Memory) -> Dataset | None:
    """The dataset in this folder, checked; None when the folder holds nothing of that name.

    Raises:
        DataError: the folder does not exist, or what it holds is damaged (module docstring).
    """
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist or is no folder; name one with {name}-train.parquet")
    present = [pair_path(folder, name, split) for split in SPLITS if pair_path(folder, name, split).exists()]
    if len(present) == len(SPLITS):
        return _open_pair(name, folder, memory)
    if present:
        other = next(pair_path(folder, name, split) for split in SPLITS if not pair_path(folder, name, split).exists())
        raise DataError(f"{folder} holds {present[0].name} but not {other.name}; add it, or remove the other")
    return _open_torchvision(name, folder)


def _open_pair(name: str, folder: Path, memory: Memory) -> Dataset:
    headers = {split: read_header(pair_path(folder, name, split)) for split in SPLITS}
    _check_agreement(name, headers["train"], headers["test"])
    sums = read_sums(folder)
    checks = {split: _check_file(name, split, headers[split], sums, memory) for split in SPLITS}
    listed = all(header.path.name in sums for header in headers.values())
    return _dataset(
        name,
        headers["train"].class_names,
        grey=headers["train"].grey,
        flip=headers["train"].flip,
        where=f"{folder / name}-*.parquet ({headers['train'].source})",
        contents={split: check.content for split, check in checks.items()},
        verified=listed or all(check.known for check in checks.values()),
        sizes={split: header.rows for split, header in headers.items()},
        reader=ParquetReader(folder, name),
    )


def _dataset(
    name: str,
    class_names: tuple[str, ...],
    *,
    grey: bool,
    flip: bool,
    where: str,
    contents: dict[SplitName, str],
    verified: bool,
    sizes: dict[SplitName, int],
    reader: Reader,
) -> Dataset:
    """The record of a checked dataset; a known name has its own flip rule."""
    if contents["train"] == contents["test"]:
        raise DataError(f"{where}: train and test hold the same images; accuracies would mean nothing: replace one")
    return Dataset(
        name=name,
        class_names=class_names,
        grey=grey,
        flip=KNOWN[name].flip if name in KNOWN else flip,
        source=where if verified else f"{where}, unverified",
        digest=dataset_digest(contents["train"], contents["test"]),
        verified=verified,
        sizes={"train": sizes["train"], "test": sizes["test"]},
        reader=reader,
    )


def _check_agreement(name: str, train: Header, test: Header) -> None:
    """Both files describe the same dataset, and a known name its own colour."""
    for field in ("class_names", "height", "width", "channels", "flip"):
        ours, theirs = getattr(train, field), getattr(test, field)
        if ours != theirs:
            found = f"{train.path} and {test.path.name} differ in {field}: {ours} and {theirs}"
            raise DataError(f"{found}; write both alike")
    if name in KNOWN and train.channels != KNOWN[name].channels:
        want = KNOWN[name].channels
        raise DataError(f"{train.path} has {train.channels} channels; {name} has {want}: give the file another name")


def _check_file(name: str, split: SplitName, header: Header, sums: dict[str, str], memory: Memory) -> Check:
    remembered = memory.recall(header.path)
    sha256 = remembered.sha256 if remembered else file_sha256(header.path)
    listed = sums.get(header.path.name, sha256)
    if listed != sha256:
        raise DataError(f"{header.path} has SHA-256 {sha256}; {SUMS} expects {listed}: copy the file again")
    check = remembered or Check(sha256, *_content(header, sha256))
    _check_identity(name, split, header, check)
    if remembered is None:
        memory.remember(header.path, check)
    return check


def _content(header: Header, sha256: str) -> tuple[str, bool]:
    """Digest of the decoded content and whether it is known; a known file need not be decoded."""
    known = identify_file(sha256)
    if known is not None:
        return KNOWN[known[0]].release.contents[known[1]], True
    content = content_sha256(read_split(header))
    return content, identify_content(content) is not None


def _check_identity(name: str, split: SplitName, header: Header, check: Check) -> None:
    """Known content is where it belongs, and a claim to be a release is true (rules 3 and 4)."""
    known = identify_content(check.content)
    if known is not None:
        same_split = known[1] == split
        if not same_split or (name in KNOWN and known[0] != name):
            raise DataError(f"{header.path} holds {known[0]}'s {known[1]} images; put {name}'s {split} images there")
        return
    claimed = claimed_release(header.source, header.rows, split)
    if claimed is not None:
        expected = KNOWN[claimed].release.contents[split]
        raise DataError(
            f"{header.path} claims to be {claimed} ({header.source}, {header.rows} images), but its digest is "
            f"sha256:{check.content}, expected sha256:{expected}; copy it again, or change `source` if it is your own"
        )


def read_sums(folder: Path) -> dict[str, str]:
    """File name to SHA-256, from the folder's optional SHA256SUMS (the format of `sha256sum`)."""
    path = folder / SUMS
    if not path.exists():
        return {}
    try:
        lines = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
        return {file.strip().lstrip("*").removeprefix("./"): digest.lower() for digest, file in lines}
    except (OSError, ValueError) as error:
        message = f"{path} cannot be read ({error}); make it again with `sha256sum *.parquet > {SUMS}`"
        raise DataError(message) from error


def _open_torchvision(name: str, folder: Path) -> Dataset | None:
    if name not in KNOWN or not torchvision_layout.present(name, folder):
        return None
    reader = torchvision_layout.TorchvisionReader(folder, name)
    loaded = {split: reader.load(split) for split in SPLITS}
    known = KNOWN[name]
    contents = {split: content_sha256(loaded[split]) for split in SPLITS}
    sizes = {split: len(loaded[split]) for split in SPLITS}
    verified = all(known.release.contents[split] == contents[split] for split in SPLITS)
    for split in SPLITS:
        expected = known.release.contents[split]
        if sizes[split] == known.release.sizes[split] and contents[split] != expected:
            place = folder / torchvision_layout.place(name)
            found = f"its {split} images have the digest sha256:{contents[split]}, expected sha256:{expected}"
            raise DataError(f"{place} is {name} by its size, but {found}; download it again")
    return _dataset(
        name,
        known.class_names,
        grey=known.grey,
        flip=known.flip,
        where=f"{folder / torchvision_layout.place(name)} (torchvision's layout)",
        contents=contents,
        verified=verified,
        sizes=sizes,
        reader=reader,
    )
