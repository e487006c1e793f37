import io
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from nkat_ray.data import DataError, Split
from nkat_ray.data.parquet import open_shards, write_split


def opened(path):
    return open_shards({"train": (path,)})


def decoded(path):
    layout = opened(path)
    return layout.load("train", layout.shape())


def random_split(n, channels, height, width, classes=3, seed=0):
    generator = np.random.default_rng(seed)
    images = generator.integers(256, size=(n, channels, height, width), dtype=np.uint8)
    return Split(images, generator.integers(classes, size=n))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 40),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 32),
    width=st.integers(1, 32),
    encoding=st.sampled_from(["raw", "png", "webp"]),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_read_back(tmp_path, n, channels, height, width, encoding, seed):
    path = tmp_path / "x.parquet"
    split = random_split(n, channels, height, width, seed=seed)
    write_split(path, split, class_names=("a", "b", "c"), source="a test", encoding=encoding)
    layout = opened(path)
    read = layout.load("train", layout.shape())
    np.testing.assert_array_equal(read.images, split.images)
    np.testing.assert_array_equal(read.labels, split.labels)
    np.testing.assert_array_equal(layout.labels("train"), split.labels)
    assert read.images.flags.c_contiguous
    assert read.labels.dtype == np.int64
    assert (layout.size("train"), layout.shape(), layout.flip) == (n, (channels, height, width), None)
    assert layout.class_names == ("a", "b", "c")
    rows = np.random.default_rng(seed).integers(n, size=5)
    np.testing.assert_array_equal(layout.load("train", layout.shape(), rows).images, split.images[rows])
    np.testing.assert_array_equal(layout.load("train", layout.shape(), rows).labels, split.labels[rows])


def test_raw_images_are_channels_last(tmp_path, write_file):
    path = write_file(tmp_path / "x.parquet", n=3, shape="4,5,3")
    row = pq.read_table(path)["image"][1].as_py()
    expected = np.frombuffer(row, np.uint8).reshape(4, 5, 3)
    np.testing.assert_array_equal(decoded(path).images[1].transpose(1, 2, 0), expected)


def test_png_equals_pillow(tmp_path, write_file):
    pixels = np.random.default_rng(0).integers(256, size=(2, 8, 8, 3), dtype=np.uint8)
    path = write_file(tmp_path / "x.parquet", n=2, metadata={"encoding": "png"}, image=encoded(pixels, "png"))
    np.testing.assert_array_equal(decoded(path).images, pixels.transpose(0, 3, 1, 2))


def test_flip_is_read_from_the_metadata(tmp_path, write_file):
    assert opened(write_file(tmp_path / "a.parquet", shape="8,8", metadata={"flip": "true"})).flip is True
    assert opened(write_file(tmp_path / "b.parquet", metadata={"flip": "false"})).flip is False


def encoded(pixels, kind):
    def one(image):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, kind)
        return buffer.getvalue()

    return pa.array([one(image) for image in pixels], pa.binary())


def grey16(n):
    return encoded(np.zeros((n, 8, 8), np.uint16), "png")


DAMAGE = {
    "label above the classes": (dict(label=pa.array([0, 1, 7])), "row 2 has label 7; allowed: 0..1"),
    "negative label": (dict(label=pa.array([0, -1, 1])), "row 1 has label -1"),
    "huge unsigned label": (
        dict(label=pa.array([0, 2**63 + 5, 1], pa.uint64())),
        "row 1 has label 9223372036854775813; allowed: 0..1",
    ),
    "empty label": (dict(label=pa.array([0, None, 1])), "1 labels are empty"),
    "label of words": (dict(label=pa.array(["a", "b", "c"])), "column `label` is string"),
    "label of floats": (dict(label=pa.array([0.0, 1.0, 0.5])), "column `label` is double"),
    "no label": (dict(label=None), "no column holds labels (columns: image)"),
    "no image": (dict(image=None), "no column holds images (columns: label)"),
    "images as lists": (dict(image=pa.array([[1], [2], [3]])), "column `image` is list"),
    "empty image": (dict(image=pa.array([b"x" * 192, None, b"x" * 192])), "1 images are empty"),
    "short image": (dict(image=pa.array([b"x" * 192, b"x" * 191, b"x" * 192])), "row 1 holds 191 bytes; allowed: 192"),
    "float images": (dict(image=pa.array([b"x" * 768] * 3)), "row 0 holds 768 bytes"),
    "no encoding": (dict(metadata={"encoding": None}), "lack encoding"),
    "unknown encoding": (dict(metadata={"encoding": "jpeg"}), "encoding is 'jpeg'; allowed: raw, png, webp"),
    "no shape": (dict(metadata={"shape": None}), "lack shape"),
    "too large": (dict(shape="33,32,3"), 'allowed: "H,W"'),
    "four channels": (dict(shape="8,8,4"), "C 1 or 3"),
    "one number": (dict(metadata={"shape": "8"}), "shape is '8'"),
    "words": (dict(metadata={"shape": "8,8,rgb"}), "shape is '8,8,rgb'"),
    "no classes": (dict(metadata={"classes": None}), "lack classes"),
    "one class": (dict(metadata={"classes": "cat"}), "two or more"),
    "a class twice": (dict(metadata={"classes": "cat,cat"}), "two or more different"),
    "bad flip": (dict(metadata={"flip": "maybe"}), "flip is 'maybe'; allowed: true, false"),
    "no images": (dict(n=0), "holds 0 images"),
    "no png": (dict(metadata={"encoding": "png"}), "row 0 is no readable png"),
    "no webp": (dict(metadata={"encoding": "webp"}), "row 0 is no readable webp"),
    "png too large": (
        dict(metadata={"encoding": "png"}, image=encoded(np.zeros((3, 40, 40, 3), np.uint8), "png")),
        "row 0 is no readable png (it is 40x40 RGB; allowed: 8x8 RGB as `shape` says)",
    ),
    "grey png": (
        dict(metadata={"encoding": "png"}, image=encoded(np.zeros((3, 8, 8), np.uint8), "png")),
        "it is 8x8 L; allowed: 8x8 RGB",
    ),
    "16 bit png": (dict(metadata={"encoding": "png"}, shape="8,8", image=grey16(3)), "it is 8x8 I;16; allowed: 8x8 L"),
    "truncated png": (
        dict(
            metadata={"encoding": "png"},
            image=pa.array(
                [
                    b[:60]
                    for b in encoded(
                        np.random.default_rng(0).integers(256, size=(3, 8, 8, 3), dtype=np.uint8), "png"
                    ).to_pylist()
                ]
            ),
        ),
        "row 0 is no readable png",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_in_one_line(tmp_path, write_file, kind):
    options, message = DAMAGE[kind]
    path = write_file(tmp_path / "x.parquet", **{"n": 3, **options})
    with pytest.raises(DataError) as caught:
        decoded(path)
    text = str(caught.value)
    assert message in text
    assert "x.parquet" in text
    assert "\n" not in text


def test_everything_wrong_is_named_at_once(tmp_path, write_file):
    nothing = dict.fromkeys(("encoding", "shape", "classes"))
    path = write_file(
        tmp_path / "x.parquet", metadata={**nothing, "flip": "maybe"}, label=None, image=None, img=[b"x"] * 20
    )
    with pytest.raises(DataError) as caught:
        opened(path)
    for message in (
        "no column holds labels",
        "lack encoding, shape, classes",
        "flip is 'maybe'",
    ):
        assert message in str(caught.value)


@pytest.mark.parametrize("keep", [0, 3, 100, -1, -200])
def test_a_file_cut_short_is_damaged(tmp_path, write_file, keep):
    path = write_file(tmp_path / "x.parquet")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as Parquet"):
        decoded(path)


# Reported in duckdb/duckdb#22399, apache/arrow#30797
@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_zeros_amid_a_file_are_damage(tmp_path, encoding):
    """As a copy leaves them that was cut off; compressed or not, raw pixels would still be pixels."""
    path = tmp_path / "x.parquet"
    write_split(path, random_split(100, 3, 8, 8), class_names=CLASSES, source="a test", encoding=encoding)
    content = path.read_bytes()
    start = len(content) // 2
    path.write_bytes(content[:start] + bytes(50) + content[start + 50 :])
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as Parquet .*; it is damaged"):
        decoded(path)


def test_a_folder_or_nothing_in_its_place(tmp_path):
    (tmp_path / "x.parquet").mkdir()
    for name in ("x.parquet", "y.parquet"):
        with pytest.raises(DataError, match="cannot be read"):
            opened(tmp_path / name)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    split = random_split(4, 1, 5, 5)
    write_split(path, split, class_names=("a", "b", "c"), source="old")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        write_split(path, split, class_names=("a", "b", "c"), source="new")
    assert opened(path).source == "old"
    assert [entry.name for entry in Path(tmp_path).iterdir()] == ["x.parquet"]


# --- anything at all in place of a file: it is loaded, or refused in one line -----------------------------------------

check = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
CLASSES = ("a", "b", "c")


def load(path: Path) -> None:
    """Read all of a file: what comes is what the header says, or a DataError says in one line why not."""
    refusal = None
    try:
        layout = opened(path)
        labels, split = layout.labels("train"), layout.load("train", layout.shape())
    except DataError as error:
        refusal = str(error)
    if refusal is not None:
        assert path.name in refusal
        assert "\n" not in refusal
        return
    shape = (layout.size("train"), *layout.shape())
    assert (split.images.shape, split.images.dtype) == (shape, np.uint8)
    np.testing.assert_array_equal(split.labels, labels)
    assert set(labels) <= set(range(len(layout.class_names)))


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    for encoding in ("raw", "png", "webp"):
        path = folder / encoding
        write_split(path, random_split(3, 3, 8, 8), class_names=CLASSES, source="a test", encoding=encoding)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@check
@given(st.sampled_from(["raw", "png", "webp"]), st.data())
def test_damaged_bytes(tmp_path, whole_files, encoding, data):
    content = bytearray(whole_files[encoding])
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4), label="places"):
        content[place] ^= data.draw(st.integers(1, 255), label="flip")
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2), label="part"))
    part = data.draw(st.sampled_from(["all", "head", "without the part"]), label="kept")
    kept = {"all": content, "head": content[:stop], "without the part": content[:start] + content[stop:]}[part]
    (tmp_path / "x.parquet").write_bytes(kept)
    load(tmp_path / "x.parquet")


@check
@given(st.binary(max_size=300))
@example(b"PAR1" * 8)
def test_bytes_that_never_were_a_file(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    load(tmp_path / "x.parquet")


TEXTS = st.sampled_from(
    ["", "raw", "png", "webp", "jpeg", "8,8,3", "8,8", "8,8,0", "-8,8,3", "8,8,3,1", "٨,٨", "²,8", "9" * 5000 + ",8",
     "1e1,8", " 8 , 8 ", ",", "a,b,c", "a,b", "a,,b", "true", "TRUE", "é,💥", "\0", "a\nb,c"]
)  # fmt: skip
KEYS = st.sampled_from(["encoding", "shape", "classes", "flip", "source", "more"])
TYPES = st.sampled_from(
    [pa.binary(), pa.large_binary(), pa.binary(192), pa.string(), pa.int8(), pa.uint64(), pa.int64(), pa.float64(),
     pa.bool_(), pa.null(), pa.dictionary(pa.int32(), pa.binary()), pa.list_(pa.uint8())]
)  # fmt: skip
VALUES = st.sampled_from(
    [None, b"", b"x" * 192, b"x" * 191, b"\x89PNG\r\n\x1a\n", "x", 0, 2, -1, 3, 255, 2**63, 2**64 - 1, 0.5, True, [1]]
)


def column(values, kind):
    """The values as a column of a type, null where they cannot be."""

    def held(value):
        try:
            return pa.scalar(value, kind).as_py()
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            return None

    return pa.array([held(value) for value in values], kind)


@check
@given(
    st.dictionaries(KEYS, TEXTS, max_size=3),
    st.lists(st.tuples(st.sampled_from(["image", "label", "other"]), TYPES), max_size=3),
    st.data(),
)
@example({"shape": "9" * 5000 + ",8"}, [("image", pa.binary()), ("label", pa.int64())], None)
@example({}, [("image", pa.large_binary()), ("label", pa.int64())], None)
@example({}, [("image", pa.binary()), ("label", pa.int64()), ("label", pa.int64())], None)
@example({"classes": "a\nb,c"}, [("image", pa.binary()), ("label", pa.int64())], None)
def test_any_columns_and_metadata(tmp_path, metadata, columns, data):
    rows = data.draw(st.integers(0, 3), label="rows") if data else 2
    names, arrays = [name for name, _ in columns], []
    for name, kind in columns:
        usual = [b"x" * 192] * rows if name == "image" else [0] * rows
        drawn = data and data.draw(st.none() | st.lists(VALUES, min_size=rows, max_size=rows), label=name)
        try:
            arrays.append(column(drawn or usual, kind))
        except (pa.ArrowException, TypeError):
            return
    texts = {"encoding": "raw", "shape": "8,8,3", "classes": "a,b,c", **metadata}
    table = pa.Table.from_arrays(arrays, names=names).replace_schema_metadata(texts)
    pq.write_table(table, tmp_path / "x.parquet")
    load(tmp_path / "x.parquet")


@check
@given(st.sampled_from(["png", "webp"]), st.data())
@example("png", None)
def test_images_that_are_none(tmp_path, encoding, data):
    """Damaged within a whole Parquet file, whose own checksums would have found it first."""
    pixels = np.random.default_rng(0).integers(256, size=(1, 8, 8, 3), dtype=np.uint8)
    content = bytearray(encoded(pixels, encoding)[0].as_py())
    if data is None:  # a header that promises 100,000 x 100,000 pixels: a bomb to Pillow
        head = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + content[24:29]
        content[12:33] = head + zlib.crc32(head).to_bytes(4, "big")
    else:
        for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3), label="places"):
            content[place] ^= data.draw(st.integers(1, 255), label="flip")
        content = content[: data.draw(st.just(len(content)) | st.integers(0, len(content)), label="length")]
    table = pa.table({"image": pa.array([bytes(content)], pa.binary()), "label": pa.array([0], pa.int64())})
    texts = {"encoding": encoding, "shape": "8,8,3", "classes": "a,b"}
    pq.write_table(table.replace_schema_metadata(texts), tmp_path / "x.parquet")
    load(tmp_path / "x.parquet")
