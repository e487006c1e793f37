from pathlib import Path
from typing import Any

import pytest

from nkat_ray.cluster.resources import Share
from nkat_ray.config import RunConfig
from nkat_ray.files import WEIGHTS_FILE
from nkat_ray.metrics import lambda_notes
from nkat_ray.record.journal import TrialRecord
from nkat_ray.stage2.survivor import model_survivor, survivor_of
from nkat_ray.train.checkpoint import Weights


def row(epoch: int, score: float) -> dict[str, Any]:
    return {"epoch": epoch, "local_tpe": score, "nkat_parameters": 4, "parameters": 2_000_000}


def test_a_trial_is_a_survivor_with_its_best_epoch_and_its_checkpoints_newest_first(cluster: Any) -> None:
    curve = {epoch: row(epoch, score) for epoch, score in ((1, 0.3), (2, 0.7), (3, 0.6))}
    record = TrialRecord(5, {"conv_stem": "small", "embed_dim": 512}, 0, 0, curve=curve, checkpoints=["/c/1", "/c/2"])
    found = survivor_of(record, RunConfig(), cluster)
    assert (found.trial, found.epoch, found.checkpoints) == (5, 2, ["/c/2", "/c/1"])
    assert found.share == Share(cpus=1, gpus=0.0)
    assert found.lambdas() == {"notes": lambda_notes("small", 512), "counted": 4.0, "millions": 2.0}


def test_a_network_in_a_folder_is_a_survivor_with_the_lambda_of_its_own_design(payload: bytes, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_FILE).write_bytes(payload)
    found, weights = model_survivor(tmp_path, Share(cpus=2, gpus=0.5), trial=3), Weights.from_bytes(payload)
    assert (found.trial, found.epoch, found.checkpoints) == (3, None, [str(tmp_path)])
    assert (found.conv_stem, found.embed_dim) == (weights.config.conv_stem, 16)
    parameters = sum(tensor.numel() for tensor in weights.build().parameters())
    assert found.lambdas()["millions"] == pytest.approx(parameters / 1e6)
    assert found.lambdas()["counted"] == 4
