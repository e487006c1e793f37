"""The files of a run: types, null against NaN, atomic replacement, the summary's keys."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nkat_ray.config import TrialConfig
from nkat_ray.files import CURVES_FILE, TRIALS_FILE
from nkat_ray.record import tables

# docs/spec.md section 8, spelt out: the contract must not follow the code
TRIALS = (
    "trial trial_id stop_reason epochs best_epoch best_val_accuracy best_local_tpe lambda_theory passed_gate "
    "seed gpus cpus node started_s train_s wall_s"
)
CURVES = "trial epoch train_loss val_accuracy local_tpe lr images_per_s epoch_s"
STAGE2 = (
    "trial dataset classes mode status error val_accuracy n_val val_tpe test_accuracy n_test ci_low ci_high tpe "
    "tpe_notes tpe_counted tpe_millions seconds node"
)
SUMMARY = (
    "preset gate lambda_model seed data n_trials stop_reasons survivors winner verdict targets training_share "
    "trial_start_s wall_s versions exit_code"
)


@pytest.mark.parametrize(
    ("schema", "columns"),
    [(tables.TRIALS_SCHEMA, TRIALS), (tables.CURVES_SCHEMA, CURVES), (tables.STAGE2_SCHEMA, STAGE2)],
)
def test_schema_has_every_column_of_the_contract(schema: pa.Schema, columns: str) -> None:
    assert set(columns.split()) <= set(schema.names)


def test_every_configuration_field_is_a_column_of_its_type() -> None:
    for field in dataclasses.fields(TrialConfig):
        assert f"config/{field.name}" in tables.TRIALS_SCHEMA.names
    types = {name: str(tables.TRIALS_SCHEMA.field(f"config/{name}").type) for name in vars(TrialConfig())}
    assert types["split_heads"] == "bool"
    assert types["stem_stride"] == types["top_k"] == types["cutout"] == "int64"
    assert types["top_p"] == types["lr"] == types["ema"] == "double"
    assert types["conv_stem"] == "string"
    assert tables.TRIALS_SCHEMA.field("config/randaugment").type == pa.list_(pa.int64())


def test_configuration_survives_the_round_trip(tmp_path: Path) -> None:
    configs = [
        TrialConfig(),
        TrialConfig(top_k=None, top_p=None, randaugment=None, cutout=None, ema=None, clip_grad=None),
    ]
    rows = [{"trial": n, **{f"config/{k}": v for k, v in vars(config).items()}} for n, config in enumerate(configs)]
    tables.write_rows(tmp_path / TRIALS_FILE, rows)
    assert [TrialConfig(**tables.config_of(row)) for row in tables.read_rows(tmp_path / TRIALS_FILE)] == configs


def test_a_trial_that_was_never_finite_has_null_best(tmp_path: Path) -> None:
    path = tmp_path / TRIALS_FILE
    tables.write_rows(
        path, [{"trial": 0, "best_val_accuracy": math.nan, "best_local_tpe": math.nan, "best_epoch": None}]
    )
    table = pq.read_table(path)
    assert [table[name].null_count for name in ("best_val_accuracy", "best_local_tpe", "best_epoch")] == [1, 1, 1]
    assert tables.read_rows(path)[0]["best_local_tpe"] is None


def test_curves_keep_nan_apart_from_null(tmp_path: Path) -> None:
    path = tmp_path / CURVES_FILE
    tables.write_rows(path, [{"trial": 0, "epoch": 1, "local_tpe": math.nan}])
    (row,) = tables.read_rows(path)
    assert math.isnan(row["local_tpe"])
    assert row["val_accuracy"] is None


@pytest.mark.parametrize(("name", "schema"), tables.SCHEMAS.items())
def test_an_empty_table_keeps_its_schema(name: str, schema: pa.Schema, tmp_path: Path) -> None:
    path = tmp_path / name
    tables.write_rows(path, [], metadata={"name": "run", "gate": 0.6, "seed": 3})
    assert tables.read_rows(path) == []
    assert pq.read_schema(path).equals(schema)
    assert pq.read_schema(path).metadata == {b"name": b"run", b"gate": b"0.6", b"seed": b"3"}


def test_unknown_columns_and_wrong_types_are_refused_and_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / TRIALS_FILE
    tables.write_rows(path, [{"trial": 5}])
    with pytest.raises(ValueError, match="no column best_tpe"):
        tables.write_rows(path, [{"trial": 0, "best_tpe": 1.0}])
    with pytest.raises(ValueError, match="column epochs must hold int64"):
        tables.write_rows(path, [{"trial": 0, "epochs": "four"}])
    assert [row["trial"] for row in tables.read_rows(path)] == [5]
    assert [file.name for file in tmp_path.iterdir()] == [TRIALS_FILE]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / TRIALS_FILE
    tables.write_rows(path, [{"trial": 5}])

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tables.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        tables.write_rows(path, [{"trial": 6}])
    assert [row["trial"] for row in tables.read_rows(path)] == [5]
    assert [file.name for file in tmp_path.iterdir()] == [TRIALS_FILE]


def test_summary_is_json_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    summary = dict.fromkeys(SUMMARY.split()) | {
        "gate": math.nan,
        "targets": {"x": (1, math.inf)},
        "data": {"p": tmp_path},
    }
    tables.write_summary(path, summary)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(path.read_text(), parse_constant=refuse) == tables.read_summary(path)
    read = tables.read_summary(path)
    assert read["gate"] is None
    assert read["targets"] == {"x": [1, None]}
    assert read["data"] == {"p": str(tmp_path)}


def test_summary_lacking_a_key_is_refused(tmp_path: Path) -> None:
    summary = dict.fromkeys(SUMMARY.split())
    del summary["verdict"]
    with pytest.raises(ValueError, match="summary lacks verdict"):
        tables.write_summary(tmp_path / "s.json", summary)
    with pytest.raises(ValueError, match="winner lacks trial, config"):
        tables.write_summary(tmp_path / "s.json", dict.fromkeys(SUMMARY.split()) | {"winner": {}})
    assert list(tmp_path.iterdir()) == []


def test_the_room_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, nkat_ray.record.tables, nkat_ray.record.scoring, nkat_ray.report.terminal;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
