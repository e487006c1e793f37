"""Check the outputs of a quick run against docs/spec.md section 8, reading them as a user would."""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import timm
import torch

import nkat_ray.model  # noqa: F401  registers nkat_vit
from nkat_ray.config import PRESETS, TrialConfig, field_names
from nkat_ray.metrics import STAGE2_DATASETS

TRIALS = {
    "trial", "trial_id", "stop_reason", "epochs", "best_epoch", "best_val_accuracy", "best_local_tpe", "lambda_theory",
    "passed_gate", "seed", "gpus", "cpus", "node", "started_s", "train_s", "wall_s",
} | {f"config/{name}" for name in field_names(TrialConfig)}  # fmt: skip
CURVES = {"trial", "epoch", "train_loss", "val_accuracy", "local_tpe", "lr", "images_per_s", "epoch_s"}
STAGE2 = {
    "trial", "dataset", "classes", "mode", "status", "error", "val_accuracy", "n_val", "val_tpe", "test_accuracy",
    "n_test", "ci_low", "ci_high", "tpe", "tpe_notes", "tpe_counted", "tpe_millions", "seconds", "node",
}  # fmt: skip
SUMMARY = {
    "preset", "gate", "lambda_model", "seed", "data", "n_trials", "stop_reasons", "survivors", "winner", "verdict",
    "targets", "training_share", "wall_s", "versions", "exit_code",
}  # fmt: skip


def main(folder: Path) -> None:
    trials = pq.read_table(folder / "trials.parquet").to_pylist()
    curves = pq.read_table(folder / "curves.parquet").to_pylist()
    stage2 = pq.read_table(folder / "stage2.parquet").to_pylist()
    summary = json.loads((folder / "summary.json").read_text())
    assert set(trials[0]) >= TRIALS, TRIALS - set(trials[0])
    assert set(curves[0]) >= CURVES, CURVES - set(curves[0])
    assert set(stage2[0]) >= STAGE2, STAGE2 - set(stage2[0])
    assert set(summary) >= SUMMARY, SUMMARY - set(summary)

    assert [row["trial"] for row in trials] == list(range(PRESETS["quick"]["num_samples"]))
    assert all(row["stop_reason"] in {"asha", "gate", "finished"} for row in trials), summary["stop_reasons"]
    assert {(row["trial"], row["epoch"]) for row in curves} == {
        (row["trial"], epoch) for row in trials for epoch in range(1, row["epochs"] + 1)
    }
    survivors = [row["trial"] for row in trials if row["passed_gate"]]
    assert summary["survivors"] == survivors
    assert 0 < len(survivors) < len(trials), (
        f"{len(survivors)} of {len(trials)} passed: the gate of quick decides nothing"
    )
    assert {(row["trial"], row["dataset"]) for row in stage2} == {(t, d) for t in survivors for d in STAGE2_DATASETS}
    assert all(row["status"] == "ok" for row in stage2), [row["error"] for row in stage2]
    assert all(row["ci_low"] < row["test_accuracy"] < row["ci_high"] for row in stage2)
    assert summary["exit_code"] == 0
    assert summary["winner"]["robustness"] == 1.0

    model = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert list(folder.glob("tensorboard/**/events.out.tfevents.*"))
    assert (folder / "report.html").stat().st_size > 100_000
    print(f"{folder}: {len(trials)} trials, survivors {survivors}, outputs as specified")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
