"""`nkat data` as people and scripts use it: what is printed, where, and the exit code."""

import io
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nkat_ray.cli import main
from nkat_ray.data import sources
from nkat_ray.data.dataset import Unavailable

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `nkat data` in this process; returns exit code, standard output and standard error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NKAT_DATA_DIR", raising=False)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nkat", "data", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(str(ended.value.code or 0)), out, err

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of photographs, without splits."""
    for name in ("cat", "dog"):
        for number in range(5):
            place = tmp_path / "photos" / name
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([number, *name.encode()]).integers(256, size=(40, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
    return tmp_path / "photos"


# Reported in fastai/fastai#1552, huggingface/datasets#7880
def test_import_says_what_it_made(run: Run, photos: Path, tmp_path: Path) -> None:
    (photos / "cat" / "IMG_1.HEIC").write_bytes(b"x")
    code, out, _ = run("import", photos, "--out", tmp_path / "out", "--name", "pets")
    assert code == 0
    assert "pets: 2 classes (cat, dog), 8 training and 2 test images (32x32, colour)" in out
    assert "note: 1 left out: 1 .heic" in out
    assert "note: no test split: 2 test images were drawn, 20% of each class" in out


@pytest.mark.parametrize(("flag", "expected"), [("auto", "None"), ("yes", "true"), ("no", "false")])
def test_import_says_whether_images_may_be_mirrored(
    run: Run, photos: Path, tmp_path: Path, flag: str, expected: str
) -> None:
    assert run("import", photos, "--out", tmp_path / "out", "--name", "pets", "--flip", flag)[0] == 0
    for split in ("train", "test"):
        metadata = pq.read_schema(tmp_path / "out" / f"pets-{split}.parquet").metadata
        assert metadata.get(b"flip", b"None").decode() == expected


def test_import_of_splits(run: Run, photos: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "in" / split).mkdir(parents=True)
        for name in ("cat", "dog"):
            subprocess.run(["cp", "-r", photos / name, tmp_path / "in" / split], check=True)
    code, out, _ = run("import", tmp_path / "in", "--out", tmp_path / "out", "--name", "pets", "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["class_names"], document["sizes"]) == (["cat", "dog"], {"train": 10, "test": 10})
    assert "10 different test images are also training images" in document["notes"][0]


# Reported in repowise-dev/repowise#1402
def test_json_of_every_listing(run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("import", photos, "--out", tmp_path / "out", "--name", "pets")
    _, out, _ = run("list", "--data_dir", tmp_path / "out", "--json")
    rows = {row["name"]: row for row in json.loads(out)["datasets"]}
    assert rows["pets"]["state"] == "present"
    assert rows["mnist"]["state"] == "missing"
    code, out, err = run("verify", "--data_dir", tmp_path / "out", "--json")
    (row,) = json.loads(out)["datasets"]
    assert (code, row["name"], row["classes"], row["train"]) == (0, "pets", 2, 8)
    assert len(row["digest"]) == len("sha256:") + 64
    assert run("verify", "--data_dir", tmp_path / "out", "--quiet") == (0, "pets unverified\n", "")
    assert "checking pets" in err

    def offline(*_: object, **__: object) -> None:
        raise Unavailable("offline")

    monkeypatch.setattr(sources, "FETCHERS", (offline,))
    code, out, _ = run("fetch", "--json")
    assert (code, {row["state"] for row in json.loads(out)["datasets"]}) == (2, {"missing"})


# Reported in softlayer/softlayer-python#1676, Textualize/rich#501
def test_nothing_is_cut_in_a_pipe(photos: Path, tmp_path: Path) -> None:
    name = "a_dataset_with_quite_a_long_name_that_no_table_should_cut"
    place = tmp_path / ("a_folder_with_a_long_name_" * 6)
    environment = {
        **{key: value for key, value in os.environ.items() if key != "COLUMNS"},
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def piped(*words: object) -> str:
        command = [sys.executable, "-c", "from nkat_ray.cli import main; main()", "data", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    piped("import", photos, "--out", place, "--name", name)
    lines = piped("verify", "--data_dir", place).splitlines()
    (row,) = [line for line in lines if name in line and not line.startswith("note: ")]
    assert f"{place}/{name}-train.parquet" in row
    assert "sha256:" in row
    assert len(row.split("sha256:")[1].split()[0]) == 64


# Reported in pytest-dev/pytest#812, thehunmonkgroup/nagios-plugin-newest-file-age#8
@pytest.mark.parametrize("files", [[], ["notes.txt"], ["photos/1.png", "photos/2.png"]])
def test_verifying_nothing_is_no_success(run: Run, tmp_path: Path, files: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    for file in files:
        (tmp_path / "empty" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "empty" / file).write_bytes(b"")
    code, out, err = run("verify", "--data_dir", tmp_path / "empty")
    assert (code, out) == (2, "")
    assert "holds no dataset, so there is nothing to verify; expected: Parquet files" in err
    assert err.count("\n") == 1
    code, _, err = run("verify")
    assert code == 2
    assert "`nkat data fetch`" in err


def test_a_dataset_that_is_named_and_missing_is_no_success(run: Run, photos: Path, tmp_path: Path) -> None:
    run("import", photos, "--out", tmp_path / "out", "--name", "pets")
    assert run("verify", "--data_dir", tmp_path / "out", "--names", "pets")[0] == 0
    assert run("verify", "--data_dir", tmp_path / "out", "--names", "pets", "plants")[0] == 2


def test_refusals_are_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": ["a"], "x": [1]}), tmp_path / "in" / "train-00000-of-00001.parquet")
    code, out, err = run("import", tmp_path / "in", "--out", tmp_path / "out", "--name", "x")
    assert (code, out, err.count("\n")) == (2, "", 1)
    for message in (
        "no column holds images",
        "no column holds labels",
        "a column `image` or `img` (struct of bytes and path)",
    ):
        assert message in err
    assert not (tmp_path / "out").exists()


def png(side: int = 8, *, promised: int | None = None) -> bytes:
    """A PNG of noise; its header may promise another side, which few bytes can do."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(side, side, 3), dtype=np.uint8)).save(buffer, "png")
    content = buffer.getvalue()
    if promised is None:
        return content
    head = b"IHDR" + promised.to_bytes(4, "big") * 2 + content[24:29]
    return content[:12] + head + zlib.crc32(head).to_bytes(4, "big") + content[33:]


def shards(folder: Path, images: list[bytes | None], labels: pa.Array) -> Path:
    """Hugging Face's files: whole test images beside these training images; returns the training file."""
    folder.mkdir()
    names = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}}}
    for split, content, numbers in (("test", [png()] * 4, pa.array([0, 1, 0, 1])), ("train", images, labels)):
        rows = pa.array([{"bytes": image} for image in content], pa.struct([("bytes", pa.binary())]))
        table = pa.table({"image": rows, "label": numbers}).replace_schema_metadata({"huggingface": json.dumps(names)})
        pq.write_table(table, folder / f"{split}.parquet")
    return folder / "train.parquet"


LARGEST = 2**63 - 1
DAMAGED_LABELS = {
    "out of range": (pa.array([0, 2]), "row 1 has label 2; allowed: 0..1"),
    "negative": (pa.array([0, -1]), "row 1 has label -1; allowed: 0..1"),
    "the largest": (pa.array([0, LARGEST]), f"row 1 has label {LARGEST}; allowed: 0..1"),
    "the largest unsigned": (pa.array([0, 2**64 - 1], pa.uint64()), f"row 1 has label {2**64 - 1}; allowed: 0..1"),
    "none": (pa.array([0, None]), "1 labels are empty"),
    "no number": (pa.array([0.0, float("nan")]), "column `label` is double"),
    "words": (pa.array(["cat", "dog"]), "column `label` is string"),
}
DAMAGED_IMAGES = {
    "empty": (b"", "not in a known format"),
    "zeros": (bytes(200), "not in a known format"),
    "none": (None, "images are empty, or only paths"),
    "cut short": (png()[:100], "no readable image"),
    "89 million pixels": (png(promised=9_500), "exceeds limit of"),
    "10 billion pixels": (png(promised=100_000), "exceeds limit of"),
}
DAMAGED_BYTES: dict[str, Callable[[bytes], bytes]] = {
    "no bytes": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "no footer": lambda content: content[:-20],
    "half": lambda content: content[: len(content) // 2],
    "zeros at the head": lambda content: bytes(64) + content[64:],
    "zeros in the footer": lambda content: content[:-200] + bytes(100) + content[-100:],
    "a footer of two gigabytes": lambda content: content[:-8] + LARGEST.to_bytes(8, "little")[4:] + b"PAR1",
}


# Reported in duckdb/duckdb#22399, apache/arrow#30797
@pytest.mark.parametrize(
    ("labels", "image", "damage", "said"),
    [
        *[(labels, png(), None, said) for labels, said in DAMAGED_LABELS.values()],
        *[(pa.array([0, 1]), image, None, said) for image, said in DAMAGED_IMAGES.values()],
        *[(pa.array([0, 1]), png(), damage, "cannot be read as Parquet") for damage in DAMAGED_BYTES.values()],
    ],
    ids=[*DAMAGED_LABELS, *DAMAGED_IMAGES, *DAMAGED_BYTES],
)
@pytest.mark.filterwarnings("error")
def test_damaged_parquet_is_one_line_and_nothing_is_written(
    labels: pa.Array, image: bytes | None, damage: Callable[[bytes], bytes] | None, said: str, run: Run, tmp_path: Path
) -> None:
    file = shards(tmp_path / "mine", [image] * 2, labels)
    if damage:
        file.write_bytes(damage(file.read_bytes()))
    code, out, err = run("import", file.parent, "--out", tmp_path / "out", "--name", "mine")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {file}")
    assert said in err
    assert not (tmp_path / "out").exists()
    code, out, err = run("verify", "--data_dir", tmp_path, "--names", "mine", "--json", "--quiet")
    assert (code, err) == (2, "")
    (row,) = json.loads(out)["datasets"]
    assert row["state"] == "damaged"
    assert said in row["where"]
    assert "\n" not in row["where"]
