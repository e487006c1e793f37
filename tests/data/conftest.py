"""A cache of its own for every test, small Parquet pairs, and the folder of real files where there is one."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
