"""Trackers: refused before any work where they could not be told anything; MLflow for real, against files."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.search import tracking
from nkat_ray.search.callbacks import Listeners
from nkat_ray.search.journal import Journal
from nkat_ray.search.resources import Cluster
from nkat_ray.search.tracking import MLFLOW_FOLDER, refuse_absent, trackers_of
from nkat_ray.search.tuner import tune_stage1


def test_off_needs_nothing_and_tells_nobody(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    refuse_absent(tiny_run())
    assert trackers_of(tiny_run(), tmp_path) == []


@pytest.mark.parametrize("package", ["mlflow", "wandb"])
def test_an_absent_package_is_refused_in_one_line(
    package: str, tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"log_to is '{package}'.*not installed.*--extra {package}"):
        refuse_absent(tiny_run(log_to=package))


def test_a_missing_key_is_found_before_any_work(tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Keyless:
        def setup(self) -> None:
            raise ValueError("No WandB API key found")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tracking, "trackers_of", lambda run, folder: [Keyless()])
    with pytest.raises(ValueError, match="API key"):
        refuse_absent(tiny_run(log_to="wandb"))
    refuse_absent(tiny_run(log_to="mlflow"))  # its server is asked when the run begins


def test_mlflow_goes_to_the_server_that_is_named(
    tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
    (callback,) = trackers_of(tiny_run(log_to="mlflow"), tmp_path)
    assert callback.tracking_uri == "http://localhost:1"
    assert callback.experiment_name == "tiny"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_every_trial_reaches_mlflow_with_its_parameters_and_epochs(
    ray_local: Any, tiny_run: Callable[..., Any], tiny_fixed: Any, tiny_data: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from nkat_ray.search.vault import open_vault

    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run, journal = tiny_run(log_to="mlflow", name="tracked"), Journal(tmp_path)
    journal.write("run")
    vault = open_vault("tracked")
    tune_stage1(
        run, fixed=tiny_fixed, data=tiny_data, vault=vault, journal=journal, folder=tmp_path,
        tune_folder=str(tmp_path / "tune"), listeners=Listeners(),
        cluster=Cluster(cpus=2, gpus=0, nodes=1, memory_bytes=8 * 2**30, gpu_bytes=2**30),
    )  # fmt: skip
    ray_local.kill(vault)
    mlflow.set_tracking_uri((tmp_path / MLFLOW_FOLDER).as_uri())
    experiment = mlflow.get_experiment_by_name("tracked")
    client = mlflow.MlflowClient()
    found = {int(item.data.params["trial"]): item for item in client.search_runs([experiment.experiment_id])}
    assert set(found) == set(journal.state.trials)
    for number, record in journal.state.trials.items():
        history = client.get_metric_history(found[number].info.run_id, "local_tpe")
        logged = {point.step: point.value for point in history}
        assert logged == {epoch: row["local_tpe"] for epoch, row in record.curve.items()}
        assert float(found[number].data.params["temperature"]) == record.params["temperature"]
        assert "attention/entropy/block_0" in found[number].data.metrics
        assert found[number].info.status == "FINISHED"
