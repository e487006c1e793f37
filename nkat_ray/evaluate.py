"""Stage 2: survivors x datasets as parallel Ray tasks, each on its share of a GPU (docs/spec.md section 6.3).

First every survivor is carried over to every dataset and scored on validation images; that decides the ranking. Then,
once and for all survivors together, the test images are read.
"""

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from nkat_ray.config import STAGE1_DATASET, RunConfig
from nkat_ray.data import DataError, Dataset, Missing, Split, stratified_subset
from nkat_ray.data.selection import Selection, select_images, training_limits
from nkat_ray.files import WEIGHTS_FILE
from nkat_ray.metrics import LAMBDA_MODELS, NOTICES, counts, lambda_theory, tpe_score, wilson_interval
from nkat_ray.search.callbacks import one_line
from nkat_ray.search.resources import Share
from nkat_ray.search.vault import release, withdraw

Validated = tuple[dict[str, Any], bytes | None]  # a row of stage2.parquet, and the weights to be tested
TASK_RETRIES = 1  # a task whose node dies is tried once more; the second time the dataset counts as failed


@dataclass(frozen=True, kw_only=True)
class Survivor:
    """A trial that passed the gate: where its weights are and what it asks for."""

    trial: int
    epoch: int | None = None  # of the best weights so far; None for a model that no run made
    checkpoints: Sequence[str]  # on disk, newest first, should the object store have lost them
    conv_stem: str
    embed_dim: int
    nkat_parameters: int
    parameters: int
    share: Share

    def lambdas(self) -> dict[str, float]:
        """lambda_theory under each of the three models."""
        return {
            model: lambda_theory(
                model, conv_stem=self.conv_stem, embed_dim=self.embed_dim, nkat_parameters=self.nkat_parameters,
                parameters=self.parameters,
            )
            for model in LAMBDA_MODELS
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker needs to know of a dataset; the images travel beside it, by reference."""

    dataset: str
    num_classes: int
    grey: bool
    flip: bool


def transfer_weights(
    payload: bytes, selection: Selection, task: Task, run: RunConfig, seed: int, share: Share
) -> tuple[bytes, dict[str, Any]]:
    """On a worker: carry a survivor over to one dataset; its new weights and the validation figures.

    CIFAR-10, which it was trained on, is scored as it is.
    """
    from nkat_ray.train.checkpoint import Weights
    from nkat_ray.train.device import device_for
    from nkat_ray.train.loop import ImageSet
    from nkat_ray.train.transfer import count_correct_of, transfer

    clock = time.perf_counter()
    device = device_for(share.gpus, share.cpus)
    source = Weights.from_bytes(payload)
    val = ImageSet(selection.images, selection.labels, selection.val_index, device)
    if task.dataset == STAGE1_DATASET:
        correct = count_correct_of(source, val, device)
        figures = {"val_accuracy": correct / len(val), "n_val": len(val), "mode": "as trained"}
        return payload, {**figures, "node": socket.gethostname(), "seconds": time.perf_counter() - clock}
    notices: list[str] = []
    moved = transfer(
        source, mode=run.transfer, epochs=run.transfer_epochs, lr=run.transfer_lr, dataset=task.dataset,
        train=ImageSet(selection.images, selection.labels, selection.train_index, device), val=val,
        num_classes=task.num_classes, grey=task.grey, flip=task.flip, seed=seed, device=device, notice=notices.append,
    )  # fmt: skip
    figures = {"val_accuracy": moved.val_accuracy, "n_val": moved.n_val, "mode": run.transfer, NOTICES: notices}
    return moved.weights.to_bytes(), {**figures, "node": socket.gethostname(), "seconds": time.perf_counter() - clock}


def count_on_test(payload: bytes, split: Split, share: Share) -> tuple[int, int]:
    """On a worker: correct test images and their number."""
    from nkat_ray.train.checkpoint import Weights
    from nkat_ray.train.device import device_for
    from nkat_ray.train.loop import ImageSet
    from nkat_ray.train.transfer import count_correct_of

    device = device_for(share.gpus, share.cpus)
    images = ImageSet(split.images, split.labels, None, device)
    return count_correct_of(Weights.from_bytes(payload), images, device), len(images)


class WeightSource:
    """Survivors' weights by reference, each fetched once: the vault's, else those on disk, with a notice.

    Args:
        vault: holds what the trials handed over.
        notice: told when the disk had to help.
    """

    def __init__(self, vault: ActorHandle[Any], notice: Callable[[str], None]) -> None:
        self._vault, self._notice = vault, notice
        self._held: dict[int, ray.ObjectRef[bytes] | None] = {}

    def get(self, survivor: Survivor) -> "ray.ObjectRef[bytes] | None":
        """Reference to the survivor's weights; None if neither the vault nor the disk has them."""
        if survivor.trial not in self._held:
            held = withdraw(self._vault, survivor.trial)
            self._held[survivor.trial] = self.from_disk(survivor) if held is None else held
        return self._held[survivor.trial]

    def forget(self, survivor: Survivor) -> None:
        """Fetch them anew the next time: the trial may have better ones by then."""
        self._held.pop(survivor.trial, None)

    def release(self, trial: int) -> None:
        """Nobody needs a trial's weights any more: let them go, here and in the vault."""
        self._held.pop(trial, None)
        release(self._vault, trial)

    def from_disk(self, survivor: Survivor) -> "ray.ObjectRef[bytes] | None":
        """Reference to the weights as the disk has them, put anew: the object store has none, or has lost them."""
        payload = weights_on_disk(survivor.checkpoints)
        if payload is None:
            return None
        self._notice(f"trial {survivor.trial}: its weights were not in the object store and were read from disk")
        self._held[survivor.trial] = reference = ray.put(payload)
        return reference


def weights_on_disk(checkpoints: Sequence[str]) -> bytes | None:
    """The weights in the newest checkpoint that has whole ones; None if there is none."""
    from ray.tune import Checkpoint

    from nkat_ray.train.checkpoint import CheckpointError, Weights

    for path in checkpoints:
        try:
            with Checkpoint(path).as_directory() as folder:
                payload = (Path(folder) / WEIGHTS_FILE).read_bytes()
            Weights.from_bytes(payload)
            return payload
        except (FileNotFoundError, CheckpointError):
            continue  # removed, or cut short while it was written: the one before it
    return None


def validate_survivors(
    survivors: Sequence[Survivor],
    datasets: Mapping[str, Dataset | Missing],
    *,
    run: RunConfig,
    vault: ActorHandle[Any],
    done: Mapping[tuple[int, str], Any],
    notice: Callable[[str], None],
) -> Iterator[Validated]:
    """First half of Stage 2: each survivor on each dataset, in parallel.

    Args:
        survivors: in any order.
        datasets: the datasets of Stage 2; a missing one gives a row that says so.
        done: (trial, dataset) that an earlier driver finished; they are left out.
        notice: told what the user should know.

    Yields:
        Rows of stage2.parquet (validation columns) as they finish, with the weights to be tested, None where there are
        none.
    """
    validation = Validation(datasets, run=run, vault=vault, notice=notice)
    yield from validation.submit(survivors, done)
    validation.release(survivors)
    while validation.tasks:
        yield from validation.collect(wait=True)
        validation.release(survivors)


class Validation:
    """The first half of Stage 2 as it can be had in pieces: survivors are submitted, what is finished is collected.

    Args:
        datasets: the datasets of Stage 2; a missing one gives a row that says so. Each is read once.
        run: the configuration.
        vault: the survivors' weights.
        notice: told what the user should know.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset | Missing],
        *,
        run: RunConfig,
        vault: ActorHandle[Any],
        notice: Callable[[str], None],
    ) -> None:
        self._datasets, self._run, self._notice = datasets, run, notice
        self._source = WeightSource(vault, notice)
        self._images: dict[str, Any] = {}  # references to Selections
        self._pending: dict[Any, _Job] = {}
        self._released: set[int] = set()

    @property
    def tasks(self) -> int:
        """Tasks that were sent out and have not been collected."""
        return len(self._pending)

    @property
    def busy(self) -> set[int]:
        """Survivors with such tasks."""
        return {job.survivor.trial for job in self._pending.values()}

    def submit(self, survivors: Sequence[Survivor], done: Mapping[tuple[int, str], Any]) -> Iterator[Validated]:
        """Send survivors out to every dataset but those (trial, dataset) that are done.

        Yields:
            Rows that are known at once: of a dataset that is missing, cannot be read, or of weights that are lost.
        """
        for survivor in survivors:
            self._source.forget(survivor)
        for name, dataset in self._datasets.items():
            todo = [survivor for survivor in survivors if (survivor.trial, name) not in done]
            if isinstance(dataset, Missing):
                missing = {"status": "missing", "error": dataset.reason}
                yield from ((_row(s, name, None, self._run, **missing), None) for s in todo)
                continue
            try:
                images = self._images_of(dataset) if todo else None
            except (DataError, OSError) as error:  # one dataset's fault is that dataset's alone
                failed = {"status": "failed", "error": one_line(error)}
                yield from ((_row(s, name, dataset.classes, self._run, **failed), None) for s in todo)
                continue
            for survivor in todo:
                job, payload = _Job(survivor, dataset, images), self._source.get(survivor)
                if payload is None:
                    yield _failed(job, "its weights are neither in the object store nor on disk", self._run), None
                else:
                    self._pending[_submit(job, payload, self._run)] = job

    def collect(self, *, wait: bool) -> Iterator[Validated]:
        """What has been finished; with `wait` at least one, if any is on its way."""
        ready, _ = ray.wait(list(self._pending), timeout=None if wait else 0) if self._pending else ([], [])
        for ref in ready:
            yield from self._outcome(ref, self._pending.pop(ref))

    def release(self, survivors: Sequence[Survivor]) -> None:
        """Let go of what no task on its way needs: survivors' weights, and the images of datasets.

        Only after the last `submit`: what is released would have to be read again.
        """
        for survivor in survivors:
            if survivor.trial not in self.busy | self._released:
                self._source.release(survivor.trial)
                self._released.add(survivor.trial)
        needed = {job.dataset.name for job in self._pending.values()}
        self._images = {name: images for name, images in self._images.items() if name in needed}

    def _images_of(self, dataset: Dataset) -> Any:
        if dataset.name not in self._images:
            self._images[dataset.name] = ray.put(_images(dataset, self._run))
        return self._images[dataset.name]

    def _outcome(self, ref: Any, job: "_Job") -> Iterator[Validated]:
        try:
            weights, figures = ray.get(ref)
        except ray.exceptions.ObjectLostError as error:  # with the vault or its node: the disk still has the weights
            payload = None if job.again else self._source.from_disk(job.survivor)
            if payload is None:
                yield _failed(job, one_line(error), self._run), None
            else:
                again = replace(job, again=True)
                self._pending[_submit(again, payload, self._run)] = again
        except Exception as error:  # whatever a worker or its node died of counts against this dataset alone
            yield _failed(job, one_line(error), self._run), None
        else:
            for text in figures.pop(NOTICES, ()):
                self._notice(f"trial {job.survivor.trial} on {job.dataset.name}: {text}")
            yield _validated(job, figures, self._run), weights


@dataclass(frozen=True)
class _Job:
    """One survivor on one dataset."""

    survivor: Survivor
    dataset: Dataset
    images: Any  # reference to the Selection
    again: bool = False  # sent out a second time, because its weights were lost


def _images(dataset: Dataset, run: RunConfig) -> Selection:
    """What the first half reads of a dataset; of CIFAR-10, which is scored as it is, hardly more than validation."""
    limits = training_limits(dataset, run)
    return select_images(
        dataset, replace(limits, train_images=dataset.classes) if dataset.name == STAGE1_DATASET else limits
    )


def _submit(job: _Job, payload: "ray.ObjectRef[bytes]", run: RunConfig) -> "ray.ObjectRef[Any]":
    dataset, survivor = job.dataset, job.survivor
    task = Task(dataset=dataset.name, num_classes=dataset.classes, grey=dataset.grey, flip=dataset.flip)
    call = on_share(transfer_weights, survivor.share)
    reference: ray.ObjectRef[Any] = call.remote(
        payload, job.images, task, run, _seed(run, survivor, dataset.name), survivor.share
    )
    return reference


def score_on_test(
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
    survivors: Mapping[int, Survivor],
    datasets: Mapping[str, Dataset | Missing],
    *,
    run: RunConfig,
) -> Iterator[dict[str, Any]]:
    """Second half of Stage 2, after the ranking is fixed: the only place that reads test images.

    Args:
        rows: the validation rows.
        folder: holds the weights to be tested (`payload_path`); a row without weights is passed on as it is.

    Yields:
        Complete rows of stage2.parquet as they finish.
    """
    pending: dict[Any, Mapping[str, Any]] = {}
    for name, dataset in datasets.items():
        todo = [row for row in rows if row["dataset"] == name]
        yield from (dict(row) for row in todo if not payload_path(folder, row["trial"], name).exists())
        todo = [row for row in todo if payload_path(folder, row["trial"], name).exists()]
        if not todo or isinstance(dataset, Missing):
            continue
        limit = None if run.test_images is None else min(run.test_images, dataset.sizes["test"])
        try:
            images = ray.put(dataset.load("test", stratified_subset(dataset.labels("test"), limit)))
        except (DataError, OSError) as error:
            yield from ({**row, "status": "failed", "error": one_line(error)} for row in todo)
            continue
        for row in todo:
            share = survivors[row["trial"]].share
            call = on_share(count_on_test, share)
            payload = ray.put(payload_path(folder, row["trial"], name).read_bytes())
            pending[call.remote(payload, images, share)] = row
    for ref, row in as_finished(pending):
        try:
            correct, n = ray.get(ref)
        except Exception as error:  # as above: it counts against this dataset alone
            yield {**row, "status": "failed", "error": one_line(error)}
            continue
        yield {**row, **_tested(survivors[row["trial"]], row, correct, n, run)}


def payload_path(folder: Path, trial: int, dataset: str) -> Path:
    """Where a survivor's weights on a dataset are kept between the two halves of Stage 2, and for good."""
    return folder / f"trial_{trial:04d}-{dataset}.safetensors"


def on_share(function: Callable[..., Any], share: Share) -> Any:
    """A function as a Ray task that asks for a share of a node."""
    # Given to the decorator: with `options` Ray would reuse a GPU worker, whose process keeps the memory it had.
    return ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=TASK_RETRIES)(function)


def as_finished(pending: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """References with what belongs to them, as their tasks finish; `pending` is emptied."""
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=1)
        yield ready[0], pending.pop(ready[0])


def _seed(run: RunConfig, survivor: Survivor, dataset: str) -> int:
    """Seed of a transfer: follows from the run's seed, the trial and the dataset's name."""
    return int(np.random.SeedSequence([run.seed, survivor.trial, *dataset.encode()]).generate_state(1)[0])


def _row(
    survivor: Survivor, dataset: str, classes: int | None, run: RunConfig, *, status: str, error: str | None
) -> dict[str, Any]:
    mode = "as trained" if dataset == STAGE1_DATASET else run.transfer
    empty = ("val_accuracy", "n_val", "val_tpe", "test_accuracy", "n_test", "ci_low", "ci_high", "tpe")
    row: dict[str, Any] = dict.fromkeys((*empty, *(f"tpe_{model}" for model in LAMBDA_MODELS), "node", "seconds"))
    return {
        "trial": survivor.trial,
        "dataset": dataset,
        "classes": classes,
        "mode": mode,
        "status": status,
        "error": error,
        **row,
    }


def _failed(job: _Job, why: str, run: RunConfig) -> dict[str, Any]:
    return _row(job.survivor, job.dataset.name, job.dataset.classes, run, status="failed", error=why)


def _validated(job: _Job, figures: Mapping[str, Any], run: RunConfig) -> dict[str, Any]:
    classes, accuracy = job.dataset.classes, figures["val_accuracy"]
    if not counts(accuracy, classes):
        return {**_failed(job, f"at or below chance, 1 / {classes}", run), **figures}
    score = tpe_score(accuracy, job.survivor.lambdas()[run.lambda_model])
    row = _row(job.survivor, job.dataset.name, classes, run, status="ok", error=None)
    return {**row, **figures, "val_tpe": score}


def _tested(survivor: Survivor, row: Mapping[str, Any], correct: int, n: int, run: RunConfig) -> dict[str, Any]:
    accuracy = correct / n
    low, high = wilson_interval(correct, n)
    figures = {"test_accuracy": accuracy, "n_test": n, "ci_low": low, "ci_high": high}
    if not counts(accuracy, row["classes"]):
        return {**figures, "status": "failed", "error": f"test accuracy at or below chance, 1 / {row['classes']}"}
    scores = {model: tpe_score(accuracy, lam) for model, lam in survivor.lambdas().items()}
    tpes = {f"tpe_{model}": score for model, score in scores.items()}
    return {**figures, "status": row["status"], "tpe": scores[run.lambda_model], **tpes}
