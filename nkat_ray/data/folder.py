"""Open a dataset in a folder: find it (layouts.py) and check it by these rules.

1. Unreadable, inconsistent or out of range (columns, metadata, labels, image sizes): damaged.
2. A Parquet file that the `SHA256SUMS` beside it (optional) lists with another digest: damaged.
3. A known Parquet file (by SHA-256), or decoded content equal to a known release: verified. Known content under the
   name of another known dataset, or as the other split: damaged, so that test images are not used for training.
4. Otherwise, a split that claims to be a known release, by its `source` text together with that release's number of
   images (in torchvision's layout: by its location and that number): damaged, because its digest is wrong.
5. Anything else is used: `verified` if SHA256SUMS listed all files, else "unverified". That includes a subset of a
   known release, whose digest is unknown.

Damaged means a `DataError`. Results are stored (`cache.Memory`), so that the next start does not read the files again.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nkat_ray.data.cache import Check, Memory
from nkat_ray.data.dataset import (
    SPLITS,
    DataError,
    Dataset,
    Labels,
    Layout,
    Missing,
    Shape,
    Split,
    SplitName,
    Unavailable,
)
from nkat_ray.data.digests import content_sha256, dataset_digest, file_sha256
from nkat_ray.data.layouts import find
from nkat_ray.data.spec import KNOWN, claimed_release, class_names_of, identify_content, identify_file, plain, resembles

SUMS: Final = "SHA256SUMS"


@dataclass(frozen=True)
class LayoutReader:
    """Read a dataset whose shape is known."""

    layout: Layout
    shape: Shape

    def load(self, split: SplitName, rows: Labels | None = None) -> Split:
        """Decode the images at `rows` (all when None)."""
        return self.layout.load(split, self.shape, rows)

    def labels(self, split: SplitName) -> Labels:
        """Read all labels of a split."""
        return self.layout.labels(split)


def open_folder(name: str, folder: Path, memory: Memory) -> Dataset | Missing:
    """Find a dataset in a folder and check it; `Missing` says what was expected.

    Raises:
        DataError: the folder does not exist, or the dataset is damaged (module docstring).
    """
    try:
        layout, is_folder = find(name, folder)
        check = _check(layout, memory)
        if is_folder and plain(folder.resolve().name) != plain(name):
            _refuse_other_name(name, folder, layout, check)
    except Unavailable as error:
        return Missing(name, str(error))
    verified = _judge(name, layout, check)
    grey = check.shape[0] == 1
    flip = layout.flip if layout.flip is not None else not grey
    return Dataset(
        name=name,
        class_names=class_names_of(name, layout),
        grey=grey,
        flip=KNOWN[name].flip if name in KNOWN else flip,
        source=layout.where if verified else f"{layout.where}, unverified",
        digest=dataset_digest(check.contents["train"], check.contents["test"]),
        verified=verified,
        sizes={split: check.sizes[split] for split in SPLITS},
        reader=LayoutReader(layout, check.shape),
    )


def _check(layout: Layout, memory: Memory) -> Check:
    """Check a dataset's content, unless there is an earlier result; a known Parquet file is not decoded."""
    files = [path for split in SPLITS for path in layout.files(split)]
    if remembered := memory.recall(files):
        return remembered
    shape = layout.shape()
    sha256 = {str(path): file_sha256(path) for path in files if path.suffix == ".parquet"}
    contents, sizes = dict[SplitName, str](), dict[SplitName, int]()
    for split in SPLITS:
        digests = [sha256.get(str(path), "") for path in layout.files(split)]
        known = identify_file(digests[0]) if len(digests) == 1 else None
        if known:
            contents[split], sizes[split] = known, len(layout.labels(split))
        else:
            images = layout.load(split, shape)
            contents[split], sizes[split] = content_sha256(images), len(images)
    check = Check(contents, sizes, shape, sha256)
    memory.remember(files, check)
    return check


def _refuse_other_name(name: str, folder: Path, layout: Layout, check: Check) -> None:
    """Refuse a name for a folder that is itself one dataset, if the content is evidently another dataset.

    A known name requires the classes and the colour of its dataset; a known dataset must not have another name.

    Raises:
        Unavailable: it is another dataset.
    """
    known = identify_content(check.contents["train"])
    names = resembles(layout.class_names if layout.named else None, len(layout.class_names), check.shape[0])
    names = [known[0]] if known else names
    if name in names or (name not in KNOWN and not (known or (names and layout.named))):
        return
    classes = f"{len(layout.class_names)} classes: {', '.join(layout.class_names[:10])}"
    what = f"{folder} is one dataset ({' or '.join(names) + ', ' if names else ''}{classes}), not {name}"
    raise Unavailable(f"{what}; if it is {name} all the same, put it into a sub-folder of that name")


def _judge(name: str, layout: Layout, check: Check) -> bool:
    """Apply rules 2 to 5 of the module docstring: return whether the content is verified, or raise a DataError."""
    if name in KNOWN and check.shape[0] != KNOWN[name].channels:
        found = f"{layout.where} has {check.shape[0]} channels; {name} has {KNOWN[name].channels}"
        raise DataError(f"{found}: give it another name")
    listed = [_is_listed(Path(path), digest) for path, digest in check.files.items()]
    known = [_is_known(name, split, layout, check) for split in SPLITS]
    if check.contents["train"] == check.contents["test"]:
        found = f"{layout.where}: train and test hold the same images"
        raise DataError(f"{found}; accuracies would mean nothing: replace one")
    return all(known) or (bool(listed) and all(listed))


def _is_listed(path: Path, digest: str) -> bool:
    """Return whether SHA256SUMS lists a file; raise a DataError if the digest differs."""
    expected = read_sums(path.parent).get(path.name)
    if expected not in (None, digest):
        raise DataError(f"{path} has SHA-256 {digest}; {SUMS} expects {expected}: copy the file again")
    return expected is not None


def _is_known(name: str, split: SplitName, layout: Layout, check: Check) -> bool:
    """Return whether the content of a split is known; raise a DataError for a wrong name, split or claim."""
    content, size = check.contents[split], check.sizes[split]
    known = identify_content(content)
    if known is not None:
        if known[1] != split or (name in KNOWN and known[0] != name):
            found = f"{layout.where}: the {split} split holds {known[0]}'s {known[1]} images"
            raise DataError(f"{found}; put {name}'s {split} images there")
        return True
    claimed = claimed_release(name, layout.source, size, split)
    if claimed is not None:
        expected = KNOWN[claimed].release.contents[split]
        raise DataError(
            f"{layout.where}: its {split} split claims to be {claimed} ({size} images), but its digest is "
            f"sha256:{content}, expected sha256:{expected}; get it again, or change `source` if it is your own"
        )
    return False


def read_sums(folder: Path) -> dict[str, str]:
    """Read a folder's optional SHA256SUMS (the format of `sha256sum`): file name to SHA-256.

    Raises:
        DataError: the file cannot be read.
    """
    path = folder / SUMS
    if not path.exists():
        return {}
    try:
        lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {file.strip().lstrip("*").removeprefix("./"): digest.lower() for digest, file in lines}
    except (OSError, ValueError) as error:
        message = f"{path} cannot be read ({error}); make it again with `sha256sum *.parquet > {SUMS}`"
        raise DataError(message) from error
