"""The files of a run (docs/spec.md section 8): three Parquet tables and summary.json, their types and readers.

A row is a plain dict. The schema defines the types: a missing key becomes null, an unknown key is an error. Columns may
be added here, never renamed. Every file is replaced atomically, so readers never see an incomplete one.
"""

import importlib.util
import json
import math
import os
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from nkat_ray.config import TrialConfig
from nkat_ray.errors import UserError
from nkat_ray.fields import field_types
from nkat_ray.files import CURVES_FILE, STAGE2_FILE, TRIALS_FILE, write_atomically
from nkat_ray.metrics import NKAT_SCALARS

Row = dict[str, Any]
Rows = Iterable[Mapping[str, Any]]


CONFIG_PREFIX: Final = "config/"
STOP_REASONS: Final = ("finished", "asha", "smoke", "gate", "nan", "error", "budget", "user")  # null until the end

SUMMARY_KEYS: Final = (
    "preset", "gate", "lambda_model", "seed", "data", "n_trials", "stop_reasons", "survivors", "winner", "verdict",
    "targets", "training_share", "trial_start_s", "wall_s", "versions", "exit_code",
)  # fmt: skip
WINNER_KEYS: Final = (
    "trial", "config", "val_global_tpe", "global_tpe", "consistency", "robustness", "datasets",
)  # fmt: skip


def _arrow_type(core: Any) -> pa.DataType:
    """Return the column type of a configuration field: bool, int64, double, string, or list<int64> for a pair."""
    if typing.get_origin(core) is tuple:
        return pa.list_(pa.int64())
    if typing.get_origin(core) is Literal:
        core = type(typing.get_args(core)[0])
    return {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}[core]


TRIALS_SCHEMA: Final = pa.schema(
    [
        ("trial", pa.int64()),
        ("trial_id", pa.string()),
        *((CONFIG_PREFIX + name, _arrow_type(field.core)) for name, field in field_types(TrialConfig).items()),
        ("stop_reason", pa.string()),
        ("epochs", pa.int64()),
        ("best_epoch", pa.int64()),
        ("best_val_accuracy", pa.float64()),
        ("best_local_tpe", pa.float64()),
        ("lambda_theory", pa.float64()),
        ("passed_gate", pa.bool_()),
        ("seed", pa.int64()),
        ("gpus", pa.float64()),
        ("cpus", pa.float64()),
        ("node", pa.string()),
        ("started_s", pa.float64()),
        ("start_s", pa.float64()),
        ("train_s", pa.float64()),
        ("wall_s", pa.float64()),
        ("error", pa.string()),
        ("stop_detail", pa.string()),  # one line of explanation
    ]
)
CURVES_SCHEMA: Final = pa.schema(
    [
        ("trial", pa.int64()),
        ("epoch", pa.int64()),
        ("train_loss", pa.float64()),
        ("val_accuracy", pa.float64()),
        ("local_tpe", pa.float64()),
        ("lr", pa.float64()),
        ("images_per_s", pa.float64()),
        ("epoch_s", pa.float64()),
        ("started_s", pa.float64()),
        ("train_accuracy", pa.float64()),
        *((name, pa.list_(pa.float64())) for name in NKAT_SCALARS),  # one value per block
    ]
)
STAGE2_SCHEMA: Final = pa.schema(
    [
        ("trial", pa.int64()),
        ("dataset", pa.string()),
        ("classes", pa.int64()),
        ("mode", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("val_accuracy", pa.float64()),
        ("n_val", pa.int64()),
        ("val_tpe", pa.float64()),
        ("test_accuracy", pa.float64()),
        ("n_test", pa.int64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("tpe", pa.float64()),
        ("tpe_notes", pa.float64()),
        ("tpe_counted", pa.float64()),
        ("tpe_millions", pa.float64()),
        ("node", pa.string()),
        ("seconds", pa.float64()),
        ("started_s", pa.float64()),  # start of the transfer, in seconds from the run's start
    ]
)
SCHEMAS: Final = {TRIALS_FILE: TRIALS_SCHEMA, CURVES_FILE: CURVES_SCHEMA, STAGE2_FILE: STAGE2_SCHEMA}


def config_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration in a row of trials.parquet as fields of TrialConfig, pairs as tuples."""
    values = {key.removeprefix(CONFIG_PREFIX): value for key, value in row.items() if key.startswith(CONFIG_PREFIX)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def frame(rows: Rows, schema: pa.Schema) -> Any:
    """Return rows as pandas' DataFrame, or as pyarrow's Table where pandas is not installed; a missing key is null."""
    table = pa.Table.from_pylist(list(rows), schema=schema)
    return table.to_pandas() if importlib.util.find_spec("pandas") else table


def write_rows(path: Path, rows: Rows, *, metadata: Mapping[str, object] | None = None) -> None:
    """Write one of the three tables, which the file's name determines; its folder must exist.

    NaN becomes null, except in curves.parquet, where it marks the last row of a diverged trial.

    Args:
        rows: dicts with the schema's keys; missing ones are null.
        metadata: stored as text in the file's schema (the run's name, gate, seed).

    Raises:
        ValueError: a key that is not in the schema, or a value that does not fit its type.
    """
    schema, rows = SCHEMAS[path.name], list(rows)
    unknown = sorted({key for row in rows for key in row} - set(schema.names))
    if unknown:
        raise ValueError(f"{path.name} has no column {', '.join(unknown)}; columns are added in record/tables.py")
    columns = [_column(rows, field, nan_is_null=path.name != CURVES_FILE) for field in schema]
    text = {key: str(value) for key, value in (metadata or {}).items()}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema.with_metadata(text or None)), sink)
    write_atomically(path, sink.getvalue().to_pybytes())


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a table in the file's order; null becomes None, NaN stays NaN."""
    rows: list[Row] = pq.ParquetFile(path).read().to_pylist()  # read_table would search the folder for a dataset
    return rows


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json; NaN and infinities become null, since JSON has neither of them.

    Raises:
        ValueError: a key of docs/spec.md section 8 is missing, in the summary or in its winner.
    """
    _require(summary, SUMMARY_KEYS, "summary")
    if summary["winner"] is not None:
        _require(summary["winner"], WINNER_KEYS, "summary's winner")
    text = json.dumps(plain(summary), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object; NaN and infinities become null."""
    write_atomically(path, (json.dumps(plain(content), indent=2) + "\n").encode())


def read_summary(path: Path, *needed: str) -> dict[str, Any]:
    """Read summary.json, or another JSON object of a run.

    Raises:
        UserError: the file is not a JSON object, or lacks a needed key.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error})") from error
    missing = [key for key in needed if not isinstance(found, dict) or key not in found]
    if missing or not isinstance(found, dict):
        lacks = f"it has no {', '.join(missing)}" if missing else "it is not a JSON object"
        raise UserError(f"{path} is damaged, or not a run's: {lacks}")
    return found


def plain(value: Any) -> Any:
    """Convert a value for JSON: NaN and infinities to None, tuples and sets to lists, paths to text, numpy scalars."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):  # numpy's scalars
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _require(given: Mapping[str, Any], keys: Iterable[str], what: str) -> None:
    missing = [key for key in keys if key not in given]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}; every key of docs/spec.md section 8 must be there")


def _column(rows: list[Mapping[str, Any]], field: pa.Field, *, nan_is_null: bool) -> pa.Array:
    values = [row.get(field.name) for row in rows]
    if nan_is_null:
        values = [None if isinstance(value, float) and math.isnan(value) else value for value in values]
    try:
        return pa.array(values, type=field.type, from_pandas=False)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"column {field.name} must hold {field.type}: {error}") from error
