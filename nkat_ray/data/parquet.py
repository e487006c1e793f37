"""Datasets in Parquet files, one row per image: the project's layout, and Hugging Face's.

The project's: columns `image` (binary) and `label` (integer, from 0); others are ignored. Schema metadata: `encoding`
(raw, png or webp), `shape` ("H,W" or "H,W,C"; C is 1 or 3, H and W 1..32), `classes` (comma-separated names), and
optionally `source` (text) and `flip` ("true" or "false"). `raw` images are uint8 of `shape`, channels last.

Hugging Face's: a column `image` or `img`, a struct of `bytes` (an image file of any size) and `path`, and a column
`label` or `labels`. The names of the classes are in the features of the metadata `huggingface`; without them, the names
are numbers.

docs/data.md describes both for users.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from nkat_ray.data.dataset import SPLIT_WORDS, DataError, Images, Labels, Shape, Split, SplitName, first_line
from nkat_ray.data.pictures import FORMATS, Picture, PictureLayout, decode
from nkat_ray.data.spec import MAX_SIZE
from nkat_ray.files import write_atomically

Encoding = Literal["raw", "png", "webp"]
ENCODINGS: Final = ("raw", "png", "webp")
EXPECTED: Final = (
    "a column `image` (binary) and a column `label` (integers from 0) with metadata encoding, shape and classes, or "
    "Hugging Face's: a column `image` or `img` (struct of bytes and path) and a column `label`"
)

Shards = Mapping[SplitName, tuple[Path, ...]]


@dataclass(frozen=True)
class Description:
    """The checked content of a file's schema and metadata, which must be the same for all files of a dataset."""

    image: str  # name of the column of images
    label: str
    class_names: tuple[str, ...]  # names of the classes; empty if they are only numbered
    encoding: str = "any image file"  # one of ENCODINGS in the project's layout
    stated: Shape | None = None  # shape of every image, in the project's layout
    flip: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ParquetFiles(PictureLayout):
    """A dataset in Parquet files of either layout."""

    shards: Shards
    description: Description

    def files(self, split: SplitName) -> tuple[Path, ...]:
        """List the files of a split."""
        return self.shards.get(split, ())

    def size(self, split: SplitName) -> int:
        """Count the images of a split, from the files' metadata."""
        return sum(_read_schema(path)[2] for path in self.shards[split])

    def shape(self) -> Shape:
        """Return the stated shape, or else the common shape of all images."""
        return self.description.stated or super().shape()

    def labels(self, split: SplitName) -> Labels:
        """Read all labels of a split, int64 (N,)."""
        column, classes = self._column(split, self.description.label), len(self.class_names)
        if column.null_count:
            raise DataError(f"{self._place(split)}: {column.null_count} labels are empty; every image needs one")
        labels = np.asarray(column.to_numpy())
        bad = np.flatnonzero((labels < 0) | (labels >= classes))
        if bad.size:
            found = f"{self._place(split)}: row {bad[0]} has label {labels[bad[0]]}"
            raise DataError(f"{found}; allowed: 0..{classes - 1}, as there are {classes} classes: correct either")
        return labels.astype(np.int64)

    def pictures(self, split: SplitName, rows: Labels | None = None) -> list[Picture]:
        """Return the images at `rows` (all when None), still encoded."""
        place, content = self._place(split), self._images(split, rows).to_pylist()
        numbers = range(len(content)) if rows is None else rows
        return [(data, f"{place}: the image in row {row}") for row, data in zip(numbers, content, strict=True)]

    def load(self, split: SplitName, shape: Shape, rows: Labels | None = None) -> Split:
        """Decode the images at `rows` (all when None); images of a stated shape must have it."""
        labels = self.labels(split)
        if self.description.encoding == "raw":
            images = _decode_raw(self._images(split, rows), shape, self._place(split))
        else:
            formats = [self.description.encoding] if self.description.stated else FORMATS
            exact = self.description.stated is not None
            images = decode(self.pictures(split, rows), shape, formats=formats, exact=exact)
        return Split(images, labels if rows is None else labels[rows])

    def _place(self, split: SplitName) -> str:
        first, *others = self.shards[split]
        return f"{first} to {others[-1].name}" if others else str(first)

    def _images(self, split: SplitName, rows: Labels | None) -> pa.ChunkedArray:
        """Read the bytes of images, a binary column."""
        column = self._column(split, self.description.image)
        content = pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
        content = content if rows is None else content.take(pa.array(rows))
        if content.null_count:
            found = f"{self._place(split)}: {content.null_count} images are empty, or only paths"
            raise DataError(f"{found}; write the images into the file")
        return content

    def _column(self, split: SplitName, name: str) -> pa.ChunkedArray:
        chunks = []
        for path in self.shards[split]:  # not pq.read_table: it imports pyarrow.dataset, which takes a second or more
            with _readable(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
                column = file.read(columns=[name])[name]
                if len(column) != file.metadata.num_rows:
                    raise pa.ArrowInvalid(f"{len(column)} of {file.metadata.num_rows} rows in {name}")
            chunks += column.chunks
        with _readable(self.shards[split][0]):
            return pa.chunked_array(chunks)


def find_shards(folder: Path, prefix: str = "") -> Shards:
    """Find the Parquet files of each split in a folder, by their names; a missing split has no entry.

    A split is called `train`, `test` or a synonym (SPLIT_WORDS): one file `<prefix>train.parquet`, or several
    `<prefix>train-00000-of-00002.parquet`; without a prefix also a sub-folder `train` of Parquet files.

    Raises:
        DataError: some of the numbered files are missing.
    """
    found: dict[SplitName, tuple[Path, ...]] = {}
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    for split, words in SPLIT_WORDS.items():
        for word in words:
            paths = _numbered(folder, names, prefix + word)
            if not paths and not prefix and (folder / word).is_dir():
                paths = tuple(sorted((folder / word).glob("*.parquet")))
            if paths:
                found[split] = paths
                break
    return found


def _numbered(folder: Path, names: list[str], stem: str) -> tuple[Path, ...]:
    if f"{stem}.parquet" in names:
        return (folder / f"{stem}.parquet",)
    matches = (re.fullmatch(re.escape(stem) + r"-\d{5}-of-(\d{5})\.parquet", name) for name in names)
    total = max((int(match[1]) for match in matches if match), default=0)
    wanted = [f"{stem}-{number:05}-of-{total:05}.parquet" for number in range(total)]
    if missing := [name for name in wanted if name not in names]:
        raise DataError(f"{folder} lacks {', '.join(missing)}; copy the files again")
    return tuple(folder / name for name in wanted)


def open_shards(shards: Shards) -> ParquetFiles:
    """Describe a dataset from its files' schemas; no image is decoded.

    Raises:
        DataError: a file cannot be read, lacks something (the message lists all its problems), or differs from the
            other files in more than its number of images.
    """
    (first, description), *others = [(path, _describe(path)) for paths in shards.values() for path in paths]
    for path, theirs in others:
        for field, ours in vars(description).items():
            if ours != vars(theirs)[field]:
                found = f"{first} and {path.name} differ in {field}: {ours} and {vars(theirs)[field]}"
                raise DataError(f"{found}; write both alike")
    source = _read_schema(first)[1].get("source", "")
    places = [str(first), *(paths[0].name for split, paths in shards.items() if split != "train")]
    origin = source or ("source not stated" if description.stated else "Hugging Face's layout")
    return ParquetFiles(
        where=f"{' and '.join(places)} ({origin})",
        class_names=description.class_names or _numbers(shards, description.label),
        named=bool(description.class_names),
        flip=description.flip,
        source=source,
        shards=shards,
        description=description,
    )


def _describe(path: Path) -> Description:
    """Check a file's schema and metadata."""
    schema, metadata, rows = _read_schema(path)
    faults = [] if rows else ["it holds 0 images, at least 1 is needed"]
    features = _features(metadata, faults)
    image = _pick("images", ("image", "img"), schema, features, faults)
    label = _pick("labels", ("label", "labels"), schema, features, faults)
    kind = schema.field(image).type if image else pa.null()
    is_struct = pa.types.is_struct(kind)
    content = kind.field("bytes").type if is_struct and kind.get_field_index("bytes") >= 0 else kind
    if image and not (pa.types.is_binary(content) or pa.types.is_large_binary(content)):
        faults.append(f"column `{image}` is {kind}")
    if label and not pa.types.is_integer(schema.field(label).type):
        faults.append(f"column `{label}` is {schema.field(label).type}")
    if {"encoding", "shape", "classes"} & metadata.keys() or not (is_struct or "huggingface" in metadata):
        found = _own_metadata(metadata, faults)
    else:
        found = {"class_names": tuple(map(str, features.get(label, {}).get("names") or ()))}
    names = found["class_names"]
    if names and (len(names) < 2 or len(set(names)) != len(names) or not all(names)):
        faults.append(f"classes is {','.join(names)!r}; allowed: two or more different names")
    if faults:
        raise DataError(f"{path}: {'; '.join(faults)}; expected: {EXPECTED}")
    return Description(image, label, **found)


def _pick(what: str, usual: Sequence[str], schema: pa.Schema, features: Mapping[str, Any], faults: list[str]) -> str:
    """Choose the column of images or of labels by its usual names, or else by its feature; empty with a fault."""
    feature = "Image" if what == "images" else "ClassLabel"
    by_feature = [name for name in schema.names if features.get(name, {}).get("_type") == feature]
    names = [name for name in usual if name in schema.names][:1] or by_feature
    if len(names) == 1 and schema.names.count(names[0]) == 1:
        return names[0]
    several = f"columns {' and '.join(names)} all hold" if names else "no column holds"
    faults.append(f"{several} {what} (columns: {', '.join(schema.names)})")
    return ""


def _own_metadata(metadata: Mapping[str, str], faults: list[str]) -> dict[str, Any]:
    """Read the metadata of the project's layout, as fields of a Description."""
    if absent := [key for key in ("encoding", "shape", "classes") if not metadata.get(key)]:
        faults.append(f"its metadata lack {', '.join(absent)}")
    encoding, shape = metadata.get("encoding", ""), _shape(metadata.get("shape", ""))
    if encoding and encoding not in ENCODINGS:
        faults.append(f"encoding is {encoding!r}; allowed: {', '.join(ENCODINGS)}")
    if metadata.get("shape") and not shape:
        limits = f'allowed: "H,W" or "H,W,C" with H and W 1..{MAX_SIZE}, C 1 or 3'
        faults.append(f"shape is {metadata['shape']!r}; {limits}")
    flip = metadata.get("flip")
    if flip not in (None, "true", "false"):
        faults.append(f"flip is {flip!r}; allowed: true, false")
    classes = tuple(metadata["classes"].split(",")) if metadata.get("classes") else ()
    return dict(class_names=classes, encoding=encoding, stated=shape, flip=None if flip is None else flip == "true")


def _shape(text: str) -> Shape | None:
    parts = text.split(",")
    sizes = [int(part) for part in parts if part.strip().isdecimal() and len(part) < 10]
    height, width, channels = [*sizes, 1] if len(sizes) == 2 else sizes if len(sizes) == 3 else [0, 0, 0]
    fits = 1 <= height <= MAX_SIZE and 1 <= width <= MAX_SIZE and channels in (1, 3) and len(parts) == len(sizes)
    return (channels, height, width) if fits else None


def _features(metadata: Mapping[str, str], faults: list[str]) -> dict[str, dict[str, Any]]:
    """Return Hugging Face's description of each column; empty without one."""
    if "huggingface" not in metadata:
        return {}
    try:
        features = json.loads(metadata["huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        faults.append("its metadata `huggingface` are not as Hugging Face writes them")
        return {}


def _numbers(shards: Shards, column: str) -> tuple[str, ...]:
    """Return numbers as names of the classes, as many as the labels use."""
    largest = 0
    for path in (path for paths in shards.values() for path in paths):
        with _readable(path), pq.ParquetFile(path) as file:
            largest = max(largest, pc.max(file.read(columns=[column])[column]).as_py() or 0)
    if not 1 <= largest < 1000:
        path = next(iter(shards.values()))[0]
        raise DataError(f"{path}: the largest label is {largest}; allowed: 1..999, counted from 0")
    return tuple(map(str, range(largest + 1)))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn a file that cannot be read into a DataError."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        message = f"{path} cannot be read as Parquet ({first_line(error)}); it is damaged or cut short: copy it again"
        raise DataError(message) from error


def _read_schema(path: Path) -> tuple[pa.Schema, dict[str, str], int]:
    """Read a file's schema, its metadata as text, and its number of rows."""
    with _readable(path):
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
        return schema, {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}, rows


def _decode_raw(column: pa.ChunkedArray, shape: Shape, place: str) -> Images:
    """Turn channels-last bytes into (N, C, H, W)."""
    channels, height, width = shape
    size = height * width * channels
    lengths = np.asarray(pc.binary_length(column).to_numpy())
    bad = np.flatnonzero(lengths != size)
    if bad.size:
        found = f"{place}: row {bad[0]} holds {lengths[bad[0]]} bytes"
        raise DataError(f"{found}; allowed: {size}, uint8 of the stated shape: correct the images or `shape`")
    images = np.empty((len(column), *shape), np.uint8)
    row = 0
    for chunk in column.cast(pa.binary(size)).chunks:  # of fixed size: one buffer of bytes
        values = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * size, chunk.offset * size)
        images[row : row + len(chunk)] = values.reshape(-1, height, width, channels).transpose(0, 3, 1, 2)
        row += len(chunk)
    return images


def pair_path(folder: Path, name: str, split: SplitName) -> Path:
    """Return the path of one split of a dataset in the project's layout."""
    return folder / f"{name}-{split}.parquet"


def write_split(
    path: Path,
    split: Split,
    *,
    class_names: tuple[str, ...],
    source: str,
    encoding: Encoding = "raw",
    flip: bool | None = None,
) -> None:
    """Write a split in the project's layout; the file appears whole or not at all.

    Args:
        flip: whether augmentation may mirror the images; None: yes for colour, no for grey.
    """
    _, channels, height, width = split.images.shape
    metadata = {
        "encoding": encoding,
        "shape": f"{height},{width}" if channels == 1 else f"{height},{width},{channels}",
        "classes": ",".join(class_names),
        "source": source,
    } | ({} if flip is None else {"flip": str(flip).lower()})
    images = pa.array((_encode(image, encoding) for image in split.images), pa.binary(), size=len(split))
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())], metadata=metadata)
    table = pa.table([images, pa.array(split.labels)], schema=schema)
    written = pa.BufferOutputStream()
    options = {"compression": "zstd", "use_dictionary": False, "row_group_size": 20_000}
    pq.write_table(table, written, write_page_checksum=True, **options)
    write_atomically(path, memoryview(written.getvalue()))


def _encode(image: Images, encoding: str) -> bytes:
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
    if encoding == "raw":
        return pixels.tobytes()
    buffer = io.BytesIO()
    options = {"lossless": True} if encoding == "webp" else {}
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, encoding, **options)
    return buffer.getvalue()
