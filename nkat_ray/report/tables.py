"""The files of a run (docs/spec.md section 8): three Parquet tables and summary.json, their types and their readers.

A row is a plain dict. The schema decides the types: a missing key becomes null, an unknown key is an error. Columns may
be added here, never renamed. Every file is replaced whole, so a reader never meets half of one.
"""

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from nkat_ray.config import TrialConfig, field_names
from nkat_ray.files import write_atomically
from nkat_ray.metrics import NKAT_SCALARS

Row = dict[str, Any]
Rows = Iterable[Mapping[str, Any]]


CONFIG_PREFIX: Final = "config/"
STOP_REASONS: Final = ("finished", "asha", "smoke", "gate", "nan", "error", "budget")  # null while it has not ended

SUMMARY_KEYS: Final = (
    "preset", "gate", "lambda_model", "seed", "data", "n_trials", "stop_reasons", "survivors", "winner", "verdict",
    "targets", "training_share", "trial_start_s", "wall_s", "versions", "exit_code",
)  # fmt: skip
WINNER_KEYS: Final = (
    "trial", "config", "val_global_tpe", "global_tpe", "consistency", "robustness", "datasets",
)  # fmt: skip


def _arrow_type(hint: Any) -> pa.DataType:
    """The column type of a configuration field: bool, int64, double, string, or list<int64> for a pair."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (arm for arm in typing.get_args(hint) if arm is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        (hint,) = {type(value) for value in typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:
        return pa.list_(pa.int64())
    return {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.string()}[hint]


def _config_fields() -> list[tuple[str, pa.DataType]]:
    hints = typing.get_type_hints(TrialConfig)
    return [(CONFIG_PREFIX + name, _arrow_type(hints[name])) for name in field_names(TrialConfig)]


TRIALS_SCHEMA: Final = pa.schema(
    [
        ("trial", pa.int64()),
        ("trial_id", pa.string()),
        *_config_fields(),
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
        ("stop_detail", pa.string()),  # one line: why this stop reason
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
        *((name, pa.list_(pa.float64())) for name in NKAT_SCALARS),  # block by block
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
    ]
)


def config_columns(config: TrialConfig | Mapping[str, Any]) -> Row:
    """A trial's configuration as `config/<field>` columns; keys that are no field of TrialConfig are left out."""
    values = dataclasses.asdict(config) if isinstance(config, TrialConfig) else config
    return {CONFIG_PREFIX + name: values[name] for name in field_names(TrialConfig) if name in values}


def config_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The other way: a trials row's configuration as TrialConfig's own fields, pairs as tuples."""
    values = {key.removeprefix(CONFIG_PREFIX): value for key, value in row.items() if key.startswith(CONFIG_PREFIX)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def write_trials(path: Path, rows: Rows, *, metadata: Mapping[str, object] | None = None) -> None:
    """trials.parquet, a row a trial. NaN becomes null: a trial that was never finite has null `best_*`.

    Args:
        path: the file; its folder must exist.
        rows: dicts with the schema's keys; missing ones are null.
        metadata: goes into the file's schema as text (the run's name, gate, seed).

    Raises:
        ValueError: a key that is not in the schema, or a value that does not fit its type.
    """
    _write(path, rows, TRIALS_SCHEMA, metadata, nan_is_null=True)


def write_curves(path: Path, rows: Rows, *, metadata: Mapping[str, object] | None = None) -> None:
    """curves.parquet, a row a trial and epoch. NaN stays NaN: that is how a trial that diverged looks."""
    _write(path, rows, CURVES_SCHEMA, metadata, nan_is_null=False)


def write_stage2(path: Path, rows: Rows, *, metadata: Mapping[str, object] | None = None) -> None:
    """stage2.parquet, a row a survivor and dataset. NaN becomes null."""
    _write(path, rows, STAGE2_SCHEMA, metadata, nan_is_null=True)


def read_trials(path: Path) -> list[Row]:
    """Rows of trials.parquet, in the file's order, null as None."""
    return _read(path)


def read_curves(path: Path) -> list[Row]:
    """Rows of curves.parquet; NaN stays NaN."""
    return _read(path)


def read_stage2(path: Path) -> list[Row]:
    """Rows of stage2.parquet, null as None."""
    return _read(path)


def read_metadata(path: Path) -> dict[str, str]:
    """What `metadata` said when the table was written."""
    stored: Mapping[bytes, bytes] = pq.read_schema(path).metadata or {}
    return {key.decode(): value.decode() for key, value in stored.items() if not key.startswith(b"ARROW:")}


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """summary.json; NaN and infinities become null, since JSON has neither.

    Raises:
        ValueError: a key of docs/spec.md section 8 is missing, in the summary or in its winner.
    """
    _require(summary, SUMMARY_KEYS, "summary")
    if summary["winner"] is not None:
        _require(summary["winner"], WINNER_KEYS, "summary's winner")
    text = json.dumps(plain(summary), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


def read_summary(path: Path, *needed: str) -> dict[str, Any]:
    """summary.json, or another JSON object of a run, as a dict.

    Raises:
        ValueError: no JSON object, or a needed key is missing; in one line.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is no JSON ({error})") from error
    missing = [key for key in needed if not isinstance(found, dict) or key not in found]
    if missing or not isinstance(found, dict):
        lacks = f"it has no {', '.join(missing)}" if missing else "it is no JSON object"
        raise ValueError(f"{path} is damaged, or not a run's: {lacks}")
    return found


def plain(value: Any) -> Any:
    """A value that JSON can hold: NaN and infinities as None, tuples as lists, paths as text, numpy as Python."""
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


def _write(
    path: Path, rows: Rows, schema: pa.Schema, metadata: Mapping[str, object] | None, *, nan_is_null: bool
) -> None:
    rows = list(rows)
    unknown = sorted({key for row in rows for key in row} - set(schema.names))
    if unknown:
        raise ValueError(f"{path.name} has no column {', '.join(unknown)}; columns are added in report/tables.py")
    columns = [_column(rows, field, nan_is_null=nan_is_null) for field in schema]
    text = {key: str(value) for key, value in (metadata or {}).items()}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema.with_metadata(text or None)), sink)
    write_atomically(path, sink.getvalue().to_pybytes())


def _column(rows: list[Mapping[str, Any]], field: pa.Field, *, nan_is_null: bool) -> pa.Array:
    values = [row.get(field.name) for row in rows]
    if nan_is_null:
        values = [None if isinstance(value, float) and math.isnan(value) else value for value in values]
    try:
        return pa.array(values, type=field.type, from_pandas=False)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"column {field.name} must hold {field.type}: {error}") from error


def _read(path: Path) -> list[Row]:
    rows: list[Row] = pq.ParquetFile(path).read().to_pylist()  # one file: no dataset discovery over its folder
    return rows
