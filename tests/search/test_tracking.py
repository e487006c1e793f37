"""Trackers: refused before any work where they cannot be used; MLflow for real, against files."""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.cluster.resources import Cluster, Node
from nkat_ray.errors import UserError
from nkat_ray.record.journal import Journal
from nkat_ray.record.observer import Observer
from nkat_ray.record.run import Run
from nkat_ray.record.storage import RunStorage
from nkat_ray.search import tracking
from nkat_ray.search.stage1 import Stage1
from nkat_ray.search.tracking import MLFLOW_FOLDER, UPLOAD_S, refuse_absent, trackers_of
from nkat_ray.space import space_of


@dataclass(eq=False)
class FakeTrial:
    """What Ray's callback reads of a trial."""

    trial_id: str
    local_path: str
    experiment_dir_name: str = "attempt"
    config: dict[str, Any] = field(default_factory=dict)


def test_off_needs_no_package_and_adds_no_callback(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    refuse_absent(tiny_run())
    assert trackers_of(tiny_run(), tmp_path) == []


@pytest.mark.parametrize("package", ["mlflow", "wandb"])
def test_an_absent_package_is_refused_in_one_line(
    package: str, tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"log_to is '{package}'.*not installed.*--extra {package}"):
        refuse_absent(tiny_run(log_to=package))


def test_a_missing_key_is_found_before_any_work(tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Keyless:
        def setup(self) -> None:
            raise ValueError("No WandB API key found")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tracking, "trackers_of", lambda run, folder: [Keyless()])
    with pytest.raises(UserError, match="log_to is 'wandb'; it has no API key; set WANDB_API_KEY"):
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


def test_an_interrupted_run_stops_the_logging_processes_before_it_waits(
    ray_local: Any, tiny_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights & Biases, with a logging process that stands in for theirs: it ends once it is asked to."""

    class Logger:
        def __init__(self, *, logdir: str, queue: Any, **_: Any) -> None:
            self.queue, self.folder = queue, Path(logdir)

        def run(self) -> None:
            while self.queue.get()[0].name != "END":
                pass
            (self.folder / "uploaded").touch()

    monkeypatch.setattr("ray.air.integrations.wandb.wandb", object())
    monkeypatch.setattr("ray.air.integrations.wandb.WandbLoggerCallback._logger_actor_cls", Logger)
    (callback,) = trackers_of(tiny_run(log_to="wandb"), tmp_path)
    trials = [FakeTrial(str(number), str(tmp_path / str(number))) for number in range(2)]
    for trial in trials:
        Path(trial.local_path).mkdir()
        callback.log_trial_start(trial)
    callback.log_trial_end(trials[0])  # the other one is cut short by Ctrl-C
    started_s = time.monotonic()
    callback.on_experiment_end(trials)
    assert time.monotonic() - started_s < UPLOAD_S / 2
    assert all((Path(trial.local_path) / "uploaded").exists() for trial in trials)


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
    context = Run(
        config=run,
        domains=space_of(run, tiny_fixed).domains,
        datasets={},
        journal=journal,
        storage=RunStorage(tmp_path, None),
    )
    cluster = Cluster((Node(cpus=2),))
    Stage1(context, tiny_data, cluster=cluster, vault=vault, observer=Observer()).run()
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
