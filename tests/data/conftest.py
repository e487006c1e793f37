"""A cache of its own for every test, small Parquet pairs, and the folder of real files where there is one."""

import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nkat_ray.data import Split

REAL = os.environ.get("NKAT_DATA_DIR")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NKAT_DATA_DIR", raising=False)
    return tmp_path / "cache" / "nkat-ray" / "data"


@pytest.fixture
def real_dir() -> Path:
    if not REAL:
        pytest.skip("NKAT_DATA_DIR is unset: no real files")
    return Path(REAL)


@pytest.fixture
def real_dir_or_none() -> Path | None:
    return Path(REAL) if REAL else None


@pytest.fixture
def write_file() -> Callable[..., Path]:
    """Writes a Parquet file by hand, so that the layout is not checked against its own writer."""

    def write(
        path: Path,
        *,
        n: int = 20,
        shape: str = "8,8,3",
        metadata: dict[str, str | None] | None = None,
        seed: int = 0,
        **columns: pa.Array | None,
    ) -> Path:
        sizes = [int(size) for size in shape.split(",")]
        generator = np.random.default_rng(seed)
        images = generator.integers(256, size=(n, int(np.prod(sizes))), dtype=np.uint8)
        table: dict[str, pa.Array | None] = {
            "image": pa.array([image.tobytes() for image in images], pa.binary()),
            "label": pa.array(np.arange(n) % 2, pa.int64()),
            **columns,
        }
        texts = {"encoding": "raw", "shape": shape, "classes": "cat,dog", "source": "a test", **(metadata or {})}
        kept = {name: column for name, column in table.items() if column is not None}
        made = pa.table(kept).replace_schema_metadata({key: text for key, text in texts.items() if text is not None})
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(made, path)
        return path

    return write


@pytest.fixture
def write_pair(write_file: Callable[..., Path]) -> Callable[..., Path]:
    """Writes `<name>-{train,test}.parquet` into a folder and returns the folder."""

    def write(folder: Path, name: str, **options: object) -> Path:
        write_file(folder / f"{name}-train.parquet", **{"n": 20, "seed": 1, **options})
        write_file(folder / f"{name}-test.parquet", **{"n": 10, "seed": 2, **options})
        return folder

    return write


@pytest.fixture
def write_shards() -> Callable[..., list[Path]]:
    """Writes one split as Hugging Face does: images as structs of `bytes` and `path`, features in the metadata."""

    def write(
        folder: Path,
        stem: str,
        *,
        n: int = 20,
        names: Sequence[str] | None = None,
        classes: int = 2,
        shards: int = 1,
        size: tuple[int, ...] = (32, 32, 3),
        columns: tuple[str, str] = ("img", "label"),
        kind: str = "PNG",
        seed: int = 0,
        split: Split | None = None,
    ) -> list[Path]:
        generator = np.random.default_rng([seed, *stem.encode()])
        images = generator.integers(256, size=(n, *size), dtype=np.uint8)
        labels = np.arange(n) % (len(names) if names else classes)
        if split is not None:
            images, labels = split.images.transpose(0, 2, 3, 1), split.labels
        image, label = columns
        feature = {"names": list(names), "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
        info = {"info": {"features": {image: {"_type": "Image"}, label: feature}}}
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for number, part in enumerate(np.array_split(np.arange(len(labels)), shards)):
            rows = [{"bytes": encode(images[row], kind), "path": f"{row}.png"} for row in part]
            struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            table = pa.table({image: pa.array(rows, struct), label: pa.array(labels[part], pa.int64())})
            paths.append(folder / f"{stem}-{number:05}-of-{shards:05}.parquet")
            pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), paths[-1])
        return paths

    return write


def encode(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def paint() -> Callable[..., None]:
    """Writes an image of one colour."""

    def paint(
        path: Path, colour: object, size: tuple[int, int] = (40, 20), mode: str = "RGB", **options: object
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, colour).save(path, **options)

    return paint
