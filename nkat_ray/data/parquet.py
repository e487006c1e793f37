"""The Parquet layout: `<name>-{train,test}.parquet`, one row an image.

Columns: `image` (binary), `label` (integer, from 0). Schema metadata: `encoding` (raw, png or webp), `shape`
("H,W" or "H,W,C"; C is 1 or 3, H and W 1..32), `classes` (comma-separated names), and optionally `source` (for
people) and `flip` ("true" or "false"; default: true for colour). `raw` images are uint8 of `shape`, channels last; the
others are decoded with Pillow.
Further columns are ignored. docs/data.md describes the layout for people.
"""

import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from nkat_ray.data.dataset import DataError, Images, Labels, Split, SplitName, first_line
from nkat_ray.data.spec import MAX_SIZE

Encoding = Literal["raw", "png", "webp"]
ENCODINGS: Final = ("raw", "png", "webp")
BLOCK: Final = 1000  # images a decoding task: large enough to hide the cost of a task


@dataclass(frozen=True)
class Header:
    """What a file's schema and metadata say, checked."""

    path: Path
    rows: int
    encoding: str
    height: int
    width: int
    channels: int
    class_names: tuple[str, ...]
    source: str
    flip: bool

    @property
    def grey(self) -> bool:
        """One channel."""
        return self.channels == 1


def pair_path(folder: Path, name: str, split: SplitName) -> Path:
    """Path of one split of a dataset in a folder."""
    return folder / f"{name}-{split}.parquet"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn a file that cannot be read into a DataError."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        message = f"{path} cannot be read as Parquet ({first_line(error)}); it is damaged or cut short: copy it again"
        raise DataError(message) from error


def read_header(path: Path) -> Header:
    """Schema and metadata of a file, checked; no image is decoded.

    Raises:
        DataError: unreadable, columns or metadata missing, or a value out of range.
    """
    with _readable(path):
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    _check_columns(path, schema)
    if rows == 0:
        raise DataError(f"{path} holds 0 images; at least 1 is needed: write it again")
    encoding = _one_of(path, metadata, "encoding", ENCODINGS)
    height, width, channels = _shape(path, metadata)
    class_names = _class_names(path, metadata)
    flip = _one_of(path, {"flip": str(channels == 3).lower(), **metadata}, "flip", ("true", "false")) == "true"
    source = metadata.get("source", "source not stated")
    return Header(path, rows, encoding, height, width, channels, class_names, source, flip)


def _check_columns(path: Path, schema: pa.Schema) -> None:
    for column in ("image", "label"):
        if schema.names.count(column) != 1:
            found = f"{path} has columns {', '.join(schema.names)}"
            advice = "leave only one" if column in schema.names else "add"
            raise DataError(f"{found}; needed: image and label: {advice} `{column}`")
    image, label = schema.field("image").type, schema.field("label").type
    if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
        raise DataError(f"{path}: column `image` is {image}; allowed: binary (uint8 bytes, png or webp)")
    if not pa.types.is_integer(label):
        raise DataError(f"{path}: column `label` is {label}; allowed: int64")


def _required(path: Path, metadata: Mapping[str, str], key: str) -> str:
    if not metadata.get(key):
        message = f"{path}: the schema metadata has no `{key}`; needed: encoding, shape and classes"
        raise DataError(message)
    return metadata[key]


def _one_of(path: Path, metadata: Mapping[str, str], key: str, allowed: tuple[str, ...]) -> str:
    value = _required(path, metadata, key)
    if value not in allowed:
        raise DataError(f"{path}: {key} is {value!r}; allowed: {', '.join(allowed)}")
    return value


def _shape(path: Path, metadata: Mapping[str, str]) -> tuple[int, int, int]:
    text = _required(path, metadata, "shape")
    parts = text.split(",")
    sizes = [int(part) for part in parts if part.strip().isdecimal() and len(part) < 10]
    height, width, channels = ([*sizes, 1] if len(sizes) == 2 else [*sizes, 0, 0, 0])[:3]
    fits = 1 <= height <= MAX_SIZE and 1 <= width <= MAX_SIZE and channels in (1, 3)
    if len(parts) != len(sizes) or len(sizes) not in (2, 3) or not fits:
        limits = f'allowed: "H,W" or "H,W,C" with H and W 1..{MAX_SIZE}, C 1 or 3; make the images smaller'
        raise DataError(f"{path}: shape is {text!r}; {limits}")
    return height, width, channels


def _class_names(path: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
    names = tuple(_required(path, metadata, "classes").split(","))
    if len(names) < 2 or len(set(names)) != len(names) or not all(names):
        message = f"{path}: classes is {','.join(names)!r}; allowed: two or more different names, separated by commas"
        raise DataError(message)
    return names


def _read_columns(path: Path, columns: list[str]) -> pa.Table:
    with pq.ParquetFile(path) as file:  # not pq.read_table: it imports pyarrow.dataset, which takes a second or more
        return file.read(columns=columns)


def read_labels(header: Header) -> Labels:
    """All labels of a file, int64 (N,).

    Raises:
        DataError: unreadable, empty values, or a label outside the classes.
    """
    with _readable(header.path):
        column = _read_columns(header.path, ["label"])["label"]
    return _checked_labels(header, column)


def _checked_labels(header: Header, column: pa.ChunkedArray) -> Labels:
    if column.null_count:
        raise DataError(f"{header.path}: {column.null_count} labels are empty; every image needs one: write it again")
    labels = np.asarray(column.to_numpy(), dtype=np.int64)
    classes = len(header.class_names)
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if bad.size:
        where = f"{header.path}: row {bad[0]} has label {labels[bad[0]]}"
        raise DataError(f"{where}; allowed: 0..{classes - 1}, as `classes` names {classes}: correct labels or classes")
    return labels


def read_split(header: Header, rows: Labels | None = None) -> Split:
    """Decode a file, or only `rows` of it (int64 indices, in that order).

    Raises:
        DataError: unreadable, or an image that is not uint8 of the stated shape.
    """
    with _readable(header.path):
        table = _read_columns(header.path, ["image", "label"])
        table = table if rows is None else table.take(pa.array(rows))
    if table["image"].null_count:
        raise DataError(f"{header.path}: {table['image'].null_count} images are empty; write it again")
    labels = _checked_labels(header, table["label"])
    decode = _decode_raw if header.encoding == "raw" else _decode_files
    return Split(decode(header, table["image"]), labels)


def _decode_raw(header: Header, column: pa.ChunkedArray) -> Images:
    """Channels-last bytes to (N, C, H, W)."""
    size = header.height * header.width * header.channels
    lengths = np.asarray(pc.binary_length(column).to_numpy())
    bad = np.flatnonzero(lengths != size)
    if bad.size:
        where = f"{header.path}: row {bad[0]} holds {lengths[bad[0]]} bytes"
        raise DataError(f"{where}; allowed: {size}, uint8 of the stated shape: correct the images or `shape`")
    images = np.empty((len(column), header.channels, header.height, header.width), np.uint8)
    row = 0
    for chunk in column.cast(pa.binary(size)).chunks:  # of fixed size: one buffer of bytes
        values = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * size, chunk.offset * size)
        pixels = values.reshape(-1, header.height, header.width, header.channels)
        images[row : row + len(chunk)] = pixels.transpose(0, 3, 1, 2)
        row += len(chunk)
    return images


def _decode_files(header: Header, column: pa.ChunkedArray) -> Images:
    """PNG or WebP files to (N, C, H, W), in threads: Pillow's decoders release the GIL."""
    images = np.empty((len(column), header.channels, header.height, header.width), np.uint8)

    def decode(start: int) -> None:
        block = column.slice(start, BLOCK).to_pylist()
        for row, data in enumerate(block, start):
            images[row] = _decode_file(header, row, data)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(decode, range(0, len(column), BLOCK)))
    return images


def _decode_file(header: Header, row: int, data: bytes) -> Images:
    try:
        image = Image.open(io.BytesIO(data), formats=[header.encoding])
        mode, size = image.mode, image.size
        fits = size == (header.width, header.height) and mode in _modes(header)
        pixels = np.asarray(image) if fits else None  # nothing of an unexpected size is decoded
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        where = f"{header.path}: the image in row {row}"
        raise DataError(f"{where} is no readable {header.encoding} ({first_line(error)}); write it again") from error
    if pixels is None:
        want = f"{header.width}x{header.height} {'or '.join(_modes(header))} (uint8) as `shape` says"
        found = f"{header.path}: the image in row {row} is {size[0]}x{size[1]} {mode}"
        raise DataError(f"{found}; allowed: {want}: correct the images or `shape`")
    if pixels.ndim == 2:
        return pixels[None]
    return pixels.transpose(2, 0, 1)[: header.channels]  # a grey WebP decodes to three equal channels


def _modes(header: Header) -> tuple[str, ...]:
    return ("RGB",) if header.channels == 3 else ("L",) if header.encoding == "png" else ("L", "RGB")


def write_split(
    path: Path,
    split: Split,
    *,
    class_names: tuple[str, ...],
    source: str,
    encoding: Encoding = "raw",
    flip: bool | None = None,
) -> None:
    """Write a split in the layout, atomically: the file appears whole or not at all.

    Args:
        flip: whether augmentation may mirror the images; None leaves the default of the colour.
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
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", use_dictionary=False, row_group_size=20_000)


def _encode(image: Images, encoding: str) -> bytes:
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
    if encoding == "raw":
        return pixels.tobytes()
    buffer = io.BytesIO()
    options = {"lossless": True} if encoding == "webp" else {}
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, encoding, **options)
    return buffer.getvalue()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
