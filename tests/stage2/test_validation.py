"""Validation in pieces; one test has real workers, the others run the same functions in this process."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.data import Missing
from nkat_ray.files import WEIGHTS_FILE
from nkat_ray.metrics import STAGE2_DATASETS
from nkat_ray.record.run import Run
from nkat_ray.search.vault import deposit, withdraw
from nkat_ray.stage2.survivor import Survivor
from nkat_ray.stage2.validation import Validation
from nkat_ray.stage2.weights import transferred_file
from nkat_ray.train.checkpoint import Weights

Rows = dict[tuple[int, str], dict[str, Any]]


@pytest.fixture
def validate(vault: Any, cluster: Any, heard: Any) -> Callable[..., Rows]:
    """Validates survivors of a run from first to last; returns the rows in its journal."""

    def go(run: Run, survivors: list[Survivor], done: Any = ()) -> Rows:
        validation = Validation(run, cluster=cluster, vault=vault, observer=heard)
        validation.send(survivors, done)
        validation.finish(survivors)
        assert (validation.tasks, validation.busy) == (0, set())
        return run.state.stage2

    return go


@pytest.fixture
def cifar_run(make_run: Any, datasets: Any, tmp_path: Path) -> Run:
    """A run that has CIFAR-10 alone."""
    run: Run = make_run(tmp_path / "run", {"cifar10": datasets["cifar10"]})
    return run


def weights(run: Run, trial: int, dataset: str) -> bytes:
    return transferred_file(run.folder, trial, dataset).read_bytes()


def test_every_dataset_gets_a_row_and_weights_of_its_own_on_workers(
    validate: Any, make_run: Any, survivor: Any, vault: Any, payload: bytes, tmp_path: Path, heard: Any
) -> None:
    deposit(vault, 0, 0.5, payload)
    run = make_run(tmp_path / "run")
    rows = validate(run, [survivor()])
    assert sorted(name for _, name in rows) == sorted(STAGE2_DATASETS)
    for (_, name), row in rows.items():
        assert row["n_val"] == 20
        assert row["test_accuracy"] is None
        assert (weights(run, 0, name) == payload) == (name == "cifar10")  # which is scored as it is
        assert row["mode"] == ("as trained" if name == "cifar10" else "finetune")
        assert Weights.from_bytes(weights(run, 0, name)).dataset == name
    assert heard.rows == list(rows.values())
    assert heard.ticks > 0
    assert withdraw(vault, 0) is None  # nothing needs it any more


def test_the_same_seed_gives_the_same_weights(
    sent: Any, validate: Any, make_run: Any, survivor: Any, vault: Any, payload: bytes, tmp_path: Path
) -> None:
    runs = [make_run(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    for run in runs:
        deposit(vault, 0, 0.5, payload)
        validate(run, [survivor()])
    one, same, other = ({name: weights(run, 0, name) for name in STAGE2_DATASETS} for run in runs)
    assert one == same
    assert [name for name in STAGE2_DATASETS if one[name] == other[name]] == ["cifar10"]


def test_what_is_done_is_left_out(
    sent: Any, validate: Any, make_run: Any, survivor: Any, vault: Any, payload: bytes, tmp_path: Path
) -> None:
    deposit(vault, 0, 0.5, payload)
    done = [(0, name) for name in STAGE2_DATASETS if name != "cifar10"]
    assert list(validate(make_run(tmp_path / "run"), [survivor()], done)) == [(0, "cifar10")]


def test_weights_that_the_vault_lacks_are_read_from_disk_with_a_notice(
    sent: Any, validate: Any, cifar_run: Run, survivor: Any, payload: bytes, tmp_path: Path, heard: Any
) -> None:
    (tmp_path / WEIGHTS_FILE).write_bytes(payload)
    validate(cifar_run, [survivor(7, checkpoints=(str(tmp_path),))])
    assert weights(cifar_run, 7, "cifar10") == payload
    assert heard.notices == ["trial 7: its weights were not in the object store and were read from disk"]


def test_weights_that_are_nowhere_fail_that_survivor_alone(
    sent: Any, validate: Any, cifar_run: Run, survivor: Any, vault: Any, payload: bytes
) -> None:
    deposit(vault, 1, 0.5, payload)
    rows = validate(cifar_run, [survivor(0), survivor(1)])
    assert rows[0, "cifar10"]["status"] == "failed"
    assert rows[0, "cifar10"]["error"] == "its weights are neither in the object store nor on disk"
    assert rows[1, "cifar10"]["n_val"] == 20


def test_a_missing_and_a_damaged_dataset_fail_alone(
    sent: Any, validate: Any, make_run: Any, survivor: Any, datasets: Any, vault: Any, payload: bytes, tmp_path: Path
) -> None:
    mnist = datasets["mnist"]
    broken = dataclasses.replace(mnist, reader=dataclasses.replace(mnist.reader, broken=True))
    found = {"mnist": broken, "fashion_mnist": Missing("fashion_mnist", "no network"), "cifar10": datasets["cifar10"]}
    deposit(vault, 0, 0.5, payload)
    rows = validate(make_run(tmp_path / "run", found), [survivor()])
    said = {name: (row["status"], row["error"], row["classes"]) for (_, name), row in rows.items()}
    assert said["mnist"] == ("failed", "row 3 is damaged", 10)
    assert said["fashion_mnist"] == ("missing", "no network", None)
    assert rows[0, "cifar10"]["n_val"] == 20


def test_a_task_that_raises_fails_alone_on_a_worker(validate: Any, cifar_run: Run, survivor: Any, vault: Any) -> None:
    deposit(vault, 0, 0.5, b"no weights at all")
    rows = validate(cifar_run, [survivor()])
    assert rows[0, "cifar10"]["status"] == "failed"
    assert "not NKAT weights" in rows[0, "cifar10"]["error"]


# --- in pieces (`--feedback global`) ----------------------------------------------------------------------------------


def report(run: Run, trial: int, epoch: int, score: float, checkpoint: Path) -> None:
    row = {"epoch": epoch, "local_tpe": score, "val_accuracy": score, "nkat_parameters": 4, "parameters": 1000}
    run.journal.write("result", trial=trial, row=row, checkpoint=str(checkpoint))


def test_a_survivor_is_validated_while_it_trains_and_again_once_it_is_better(
    sent: Any, make_run: Any, vault: Any, cluster: Any, heard: Any, payload: bytes, tmp_path: Path
) -> None:
    (tmp_path / WEIGHTS_FILE).write_bytes(payload)
    run = make_run(tmp_path / "run")
    run.journal.write("proposed", trial=3, params={}, seed=0, study_number=3)
    report(run, 3, 1, 0.5, tmp_path)
    record, validation = run.state.trials[3], Validation(run, cluster=cluster, vault=vault, observer=heard)
    validation.submit(record)
    assert (validation.tasks, validation.busy) == (4, {3})
    while validation.tasks:
        assert validation.score(record) is None
        validation.collect(wait=False)
    first = validation.score(record)
    assert first is not None
    assert run.state.stage2_epochs == {(3, name): 1 for name in STAGE2_DATASETS}
    validation.submit(record)
    assert validation.tasks == 0  # all of it is in the journal
    report(run, 3, 2, 0.7, tmp_path)
    assert validation.score(record) is None  # nothing is known of the better weights yet
    validation.submit(record)
    assert validation.tasks == 4
    while validation.tasks:
        validation.collect(wait=True)
    assert validation.score(record) == pytest.approx(first, nan_ok=True)  # here the weights on disk are the same
    assert set(run.state.stage2_epochs.values()) == {2}
