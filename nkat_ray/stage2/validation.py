"""The validation of Stage 2: survivors x datasets as parallel Ray tasks (docs/spec.md section 6.3).

All survivors can be validated at once, or each as it passes while Stage 1 still runs (`--feedback global`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from nkat_ray.cluster.resources import Cluster
from nkat_ray.config import STAGE1_DATASET
from nkat_ray.data import DataError, Dataset, Missing
from nkat_ray.data.selection import Selection, select_images, training_limits
from nkat_ray.errors import one_line
from nkat_ray.files import write_atomically
from nkat_ray.record import scoring
from nkat_ray.record.journal import Key, TrialRecord
from nkat_ray.record.observer import Observer
from nkat_ray.record.run import Run
from nkat_ray.record.tables import Row
from nkat_ray.stage2.rows import failed_row, missing_row, validated_row
from nkat_ray.stage2.survivor import Survivor, survivor_of
from nkat_ray.stage2.tasks import Tasks
from nkat_ray.stage2.weights import WeightSource, transferred_file
from nkat_ray.stage2.worker import transfer_weights


@dataclass(frozen=True)
class _Job:
    """One survivor on one dataset."""

    survivor: Survivor
    dataset: Dataset
    images: Any  # reference to a Selection
    again: bool = False  # submitted a second time, because the weights were lost


class Validation:
    """Transfer survivors to every dataset and validate them, as tasks that are submitted and collected separately.

    A row goes into the journal after its weights have been written below `stage2/`, so that a killed driver loses no
    finished work.
    """

    def __init__(self, run: Run, *, cluster: Cluster, vault: ActorHandle[Any], observer: Observer) -> None:
        self._run, self._cluster, self._observer = run, cluster, observer
        self._weights = WeightSource(vault, observer.on_notice)
        self._images: dict[str, ray.ObjectRef[Selection]] = {}
        self._tasks: Tasks[_Job] = Tasks()
        self._released: set[int] = set()

    @property
    def tasks(self) -> int:
        """Number of tasks that were submitted and not yet collected."""
        return len(self._tasks)

    @property
    def busy(self) -> set[int]:
        """Numbers of the trials with such tasks."""
        return {job.survivor.trial for job in self._tasks.subjects}

    def submit(self, record: TrialRecord) -> None:
        """Submit the missing validations of a survivor, with the best weights that its trial has now."""
        survivor = survivor_of(record, self._run.config, self._cluster)
        self.send([survivor], self._run.state.validated(record.trial, survivor.epoch))

    def score(self, record: TrialRecord) -> float | None:
        """Return the validation Global TPE of a trial's best weights; None until all datasets are in the journal."""
        rows = self._run.state.validated(record.trial, record.best_epoch).values()
        return None if len(rows) < len(self._run.datasets) else scoring.feedback_score(rows, record.trial)

    def send(self, survivors: Sequence[Survivor], done: Collection[Key]) -> None:
        """Submit survivors for every dataset.

        Rows that need no task are recorded at once: of missing or unreadable datasets, and of lost weights.

        Args:
            done: pairs of trial and dataset to leave out.
        """
        for survivor in survivors:
            self._weights.forget(survivor)
        for name, dataset in self._run.datasets.items():
            missing = [survivor for survivor in survivors if (survivor.trial, name) not in done]
            if missing:
                self._send_to(dataset, missing)

    def collect(self, *, wait: bool) -> None:
        """Record finished validations; with `wait`, wait briefly for one to finish."""
        for job, reference in self._tasks.finished(wait=wait):
            survivor, dataset = job.survivor, job.dataset
            try:
                weights, figures, notices = ray.get(reference)
            except ray.exceptions.ObjectLostError as error:  # lost with the vault or its node; the disk has them
                payload = None if job.again else self._weights.from_disk(survivor)
                self._start(replace(job, again=True), payload, or_else=one_line(error))
            except Exception as error:  # any failure of a worker or node affects this dataset only
                self._record(survivor, failed_row(survivor, dataset, self._run.config, one_line(error)))
            else:
                for text in notices:
                    self._observer.on_notice(f"trial {survivor.trial} on {dataset.name}: {text}")
                path = transferred_file(self._run.folder, survivor.trial, dataset.name)
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, weights)
                self._record(survivor, validated_row(survivor, dataset, self._run.config, figures))

    def finish(self, survivors: Sequence[Survivor]) -> None:
        """Wait for every task; free weights and images as soon as no task needs them."""
        self._free(survivors)
        while self._tasks:
            self.collect(wait=True)
            self._free(survivors)
            self._observer.on_tick()

    def _send_to(self, dataset: Dataset | Missing, survivors: Sequence[Survivor]) -> None:
        config = self._run.config
        if isinstance(dataset, Missing):
            for survivor in survivors:
                self._record(survivor, missing_row(survivor, dataset, config))
            return
        try:
            images = self._images_of(dataset)
        except (DataError, OSError) as error:  # an unreadable dataset does not affect the others
            for survivor in survivors:
                self._record(survivor, failed_row(survivor, dataset, config, one_line(error)))
            return
        for survivor in survivors:
            self._start(_Job(survivor, dataset, images), self._weights.get(survivor))

    def _images_of(self, dataset: Dataset) -> "ray.ObjectRef[Selection]":
        if dataset.name not in self._images:
            limits = training_limits(dataset, self._run.config)
            if dataset.name == STAGE1_DATASET:  # no training here, so validation images suffice
                limits = replace(limits, train_images=dataset.classes)
            self._images[dataset.name] = ray.put(select_images(dataset, limits))
        return self._images[dataset.name]

    def _start(
        self,
        job: _Job,
        payload: "ray.ObjectRef[bytes] | None",
        *,
        or_else: str = "its weights are neither in the object store nor on disk",
    ) -> None:
        """Submit a task; without weights, record a failed row instead, with `or_else` as its error."""
        survivor, dataset, config = job.survivor, job.dataset, self._run.config
        if payload is None:
            self._record(survivor, failed_row(survivor, dataset, config, or_else))
            return
        seed = transfer_seed(config.seed, survivor.trial, dataset.name)
        self._tasks.send(
            job, transfer_weights, payload, job.images, dataset.traits, config, seed, share=survivor.share
        )  # fmt: skip

    def _record(self, survivor: Survivor, row: Row) -> None:
        self._run.journal.write("stage2", row=row, epoch=survivor.epoch)
        self._observer.on_stage2_row(row)

    def _free(self, survivors: Sequence[Survivor]) -> None:
        """Free the survivors' weights and the datasets' images that no task needs any more."""
        for survivor in survivors:
            if survivor.trial not in self.busy | self._released:
                self._weights.release(survivor)
                self._released.add(survivor.trial)
        needed = {job.dataset.name for job in self._tasks.subjects}
        self._images = {name: images for name, images in self._images.items() if name in needed}


def transfer_seed(run_seed: int, trial: int, dataset: str) -> int:
    """Derive the seed of a transfer from the run's seed, the trial's number and the dataset's name."""
    return int(np.random.SeedSequence([run_seed, trial, *dataset.encode()]).generate_state(1)[0])
