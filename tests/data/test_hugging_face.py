"""Hugging Face's Parquet files, made here with pyarrow as its library writes them."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nkat_ray.data import DataError
from nkat_ray.data.parquet import find_shards, open_shards

NAMES = ("cat", "dog", "cow")


def both(write_shards, folder, **options):
    for seed, split in enumerate(("train", "test")):
        write_shards(folder, split, seed=seed, **options)
    return open_shards(find_shards(folder))


@pytest.mark.parametrize("columns", [("img", "label"), ("image", "label"), ("image", "labels"), ("picture", "kind")])
@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_written_is_read(tmp_path, write_shards, columns, shards):
    layout = both(write_shards, tmp_path, n=20, names=NAMES, shards=shards, columns=columns)
    assert (layout.class_names, layout.named, layout.flip) == (NAMES, True, None)
    assert layout.shape() == (3, 32, 32)
    assert layout.size("train") == 20
    whole = layout.load("train", (3, 32, 32))
    generator = np.random.default_rng([0, *b"train"])
    pixels = generator.integers(256, size=(20, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(whole.images, pixels.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(whole.labels, np.arange(20) % 3)
    rows = np.array([17, 3, 3])
    np.testing.assert_array_equal(layout.load("train", (3, 32, 32), rows).images, whole.images[rows])
    np.testing.assert_array_equal(layout.labels("train"), whole.labels)


@pytest.mark.parametrize(
    ("size", "shape"), [((28, 28), (1, 28, 28)), ((40, 30), (1, 32, 32)), ((64, 64, 3), (3, 32, 32))]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_any_size_colour_and_encoding(tmp_path, write_shards, size, shape, kind):
    layout = both(write_shards, tmp_path, n=6, names=NAMES, size=size, kind=kind)
    if kind == "WEBP":
        shape = (3, *shape[1:])  # it knows no grey
    assert layout.shape() == shape
    assert layout.load("test", shape).images.shape == (6, *shape)


def test_numbered_classes(tmp_path, write_shards):
    layout = both(write_shards, tmp_path, n=20, classes=4)
    assert (layout.class_names, layout.named) == (("0", "1", "2", "3"), False)


@pytest.mark.parametrize(
    "files",
    [
        ("train.parquet", "test.parquet"),
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
        ("training.parquet", "val.parquet"),
    ],
)
def test_names_of_files(tmp_path, write_shards, files):
    for seed, file in enumerate(files):
        (path,) = write_shards(tmp_path / "made", "x", n=6, names=NAMES, seed=seed)
        (tmp_path / file).parent.mkdir(exist_ok=True)
        path.rename(tmp_path / file)
    (tmp_path / "train-notes.parquet").write_bytes(b"")
    found = find_shards(tmp_path)
    assert found == {"train": (tmp_path / files[0],), "test": (tmp_path / files[1],)}
    assert open_shards(found).size("test") == 6


def test_the_test_split_comes_before_validation(tmp_path, write_shards):
    for split in ("train", "validation", "test"):
        write_shards(tmp_path, split)
    assert find_shards(tmp_path)["test"][0].name.startswith("test-")


# Reported in duckdb/duckdb#22399, apache/arrow#30797
def test_missing_shards_are_all_named(tmp_path, write_shards):
    paths = write_shards(tmp_path, "train", shards=4)
    for path in paths[1:3]:
        path.unlink()
    with pytest.raises(DataError, match=r"lacks train-00001-of-00004\.parquet, train-00002-of-00004\.parquet"):
        find_shards(tmp_path)


def write(path, columns, features=None):
    table = pa.table(columns)
    metadata = None if features is None else {"huggingface": features}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return {"train": (path,), "test": (path,)}


def features(**names):
    return json.dumps({"info": {"features": {c: {"_type": "ClassLabel", "names": names[c]} for c in names}}})


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000"
    "3a7e9b550000000a49444154789c6360000000020001e221bc330000000049454e44ae426082"
)
IMAGE = pa.array([{"bytes": PNG, "path": None}] * 4, STRUCT)
IMAGES = pa.array([{"bytes": b"x", "path": None}] * 4, STRUCT)
CASES = {
    "nothing that is needed": (
        dict(text=["a"] * 4, x=[0.5] * 4),
        None,
        ["no column holds images", "no column holds labels", "columns: text, x", "`image` or `img`"],
    ),
    "image is no struct and labels are words": (
        dict(image=["a"] * 4, label=["cat"] * 4),
        None,
        ["column `image` is string", "column `label` is string"],
    ),
    "two kinds of labels": (
        dict(img=IMAGES, fine=[0, 1, 0, 1], coarse=[0, 0, 0, 1]),
        json.dumps(
            {"info": {"features": {c: {"_type": "ClassLabel", "names": ["a", "b"]} for c in ("fine", "coarse")}}}
        ),
        ["columns fine and coarse all hold labels"],
    ),
    "features that are none": (dict(img=IMAGES, label=[0, 1, 0, 1]), "{", ["`huggingface` are not as Hugging Face"]),
    "features too deep": (dict(img=IMAGES, label=[0, 1, 0, 1]), "[" * 99_999, ["`huggingface` are not as"]),
    "a class twice": (
        dict(img=IMAGES, label=[0, 1, 0, 1]),
        features(label=["a", "a"]),
        ["two or more different names"],
    ),
    "one class": (dict(img=IMAGES, label=[0] * 4), None, ["the largest label is 0"]),
    "no rows": (dict(img=IMAGES[:0], label=pa.array([], pa.int64())), None, ["it holds 0 images"]),
}


# Reported in duckdb/duckdb#22399, apache/arrow#30797
@pytest.mark.parametrize("case", CASES)
def test_refusals_name_everything_in_one_line(tmp_path, case):
    columns, features, messages = CASES[case]
    shards = write(tmp_path / "x.parquet", columns, features)
    with pytest.raises(DataError) as caught:
        open_shards(shards)
    for message in (*messages, "x.parquet"):
        assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (dict(img=IMAGE, label=[0, 1, 0, -1]), "row 3 has label -1; allowed: 0..1"),
        (dict(img=IMAGE, label=pa.array([0, 1, 0, None])), "1 labels are empty"),
        (dict(img=pa.array([{"bytes": None, "path": "x.png"}] * 4, STRUCT)), "4 images are empty, or only paths"),
        (dict(), "row 0 is no readable image .*; the same is true of 3 more"),
    ],
)
def test_damaged_rows(tmp_path, columns, message):
    layout = open_shards(write(tmp_path / "x.parquet", {"img": IMAGES, "label": [0, 1, 0, 1], **columns}))
    with pytest.raises(DataError, match=message):
        layout.load("train", layout.shape())


def test_files_that_differ(tmp_path, write_shards):
    write_shards(tmp_path, "train", names=NAMES)
    write_shards(tmp_path, "test", names=NAMES[::-1])
    with pytest.raises(DataError, match="differ in class_names"):
        open_shards(find_shards(tmp_path))


def test_a_file_cut_short(tmp_path, write_shards):
    (path,) = write_shards(tmp_path, "train")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet cannot be read as Parquet"):
        open_shards({"train": (path,), "test": (path,)})
