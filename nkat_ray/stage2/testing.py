"""The test of Stage 2: the only code that reads test images, once, after the ranking (docs/spec.md section 6.3)."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import ray

from nkat_ray.data import DataError, Missing, stratified_subset
from nkat_ray.errors import one_line
from nkat_ray.record.observer import Observer
from nkat_ray.record.run import Run
from nkat_ray.record.tables import Row
from nkat_ray.stage2.rows import tested_row, untested_row
from nkat_ray.stage2.survivor import Survivor
from nkat_ray.stage2.tasks import Tasks
from nkat_ray.stage2.weights import transferred_file
from nkat_ray.stage2.worker import count_on_test


def score_on_test(run: Run, survivors: Mapping[int, Survivor], observer: Observer) -> None:
    """Test the survivors on every dataset, in parallel, except where the journal has a result already.

    Each completed row of stage2.parquet goes into the journal at once. A row without transferred weights, as a failed
    validation leaves it, is completed without a test.
    """

    def keep(row: Row) -> None:
        run.journal.write("tested", row=row)
        observer.on_stage2_row(row)

    tasks: Tasks[Row] = Tasks()
    for row in _send(run, survivors, tasks):
        keep(row)
    while tasks:
        for row, reference in tasks.finished(wait=True):
            try:
                correct, n = ray.get(reference)
            except Exception as error:  # any failure of a worker or node affects this dataset only
                keep(untested_row(row, one_line(error)))
            else:
                keep(tested_row(row, survivors[row["trial"]], run.config, correct, n))
        observer.on_tick()


def _send(run: Run, survivors: Mapping[int, Survivor], tasks: Tasks[Row]) -> Iterator[Row]:
    """Submit a task for each row that needs a test; yield the rows that are complete without one."""
    untested = [row for key, row in run.state.stage2.items() if key not in run.state.tested]
    for name, dataset in run.datasets.items():
        to_test: dict[Path, Row] = {}
        for row in untested:
            path = transferred_file(run.folder, row["trial"], name)
            if row["dataset"] == name and path.exists():
                to_test[path] = row
            elif row["dataset"] == name:
                yield row
        if not to_test or isinstance(dataset, Missing):
            continue
        limit = None if run.config.test_images is None else min(run.config.test_images, dataset.sizes["test"])
        try:
            images = ray.put(dataset.load("test", stratified_subset(dataset.labels("test"), limit)))
        except (DataError, OSError) as error:
            yield from (untested_row(row, one_line(error)) for row in to_test.values())
            continue
        for path, row in to_test.items():
            payload = ray.put(path.read_bytes())
            tasks.send(row, count_on_test, payload, images, share=survivors[row["trial"]].share)
