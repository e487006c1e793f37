"""The driver of a run, from its first stage to its report.

The order makes a run safe: each event is in the journal before any code acts on it, and the summary, which marks a
finished run, is written last.
"""

import errno
import shutil
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nkat_ray.config import STAGE1_DATASET, RunConfig, default_storage_path
from nkat_ray.cost import CHECKPOINT_BYTES
from nkat_ray.data import Dataset
from nkat_ray.data.selection import select_images, training_limits
from nkat_ray.data.suite import Datasets, describe_data
from nkat_ray.errors import DONE, FAULT, INTERRUPTED, NO_SURVIVOR, one_line
from nkat_ray.files import BEST_FOLDER, ERROR_FILE, SUMMARY_FILE, TENSORBOARD_FOLDER, WEIGHTS_FILE
from nkat_ray.record import scoring, tables
from nkat_ray.record.journal import Journal
from nkat_ray.record.observer import Observer, Observers
from nkat_ray.record.rows import curve_rows, stage2_rows
from nkat_ray.record.run import Run
from nkat_ray.record.snapshots import NoticesInJournal, Snapshots
from nkat_ray.record.storage import RunStorage
from nkat_ray.record.summary import summarise, write_tables
from nkat_ray.record.warm_start import Earlier
from nkat_ray.report.progress import Progress
from nkat_ray.report.terminal import Screen, print_report
from nkat_ray.report.wording import command_line
from nkat_ray.signals import Interrupted, Interruption
from nkat_ray.space import SearchSpace, corner_configs, round1_point

if TYPE_CHECKING:
    from nkat_ray.cluster.resources import Cluster  # loads Ray; bad input is refused without it


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The inputs of a run, checked before it starts or continues."""

    config: RunConfig
    space: SearchSpace
    datasets: Datasets
    storage: RunStorage
    earlier: Earlier
    began_s: float
    extended_from: int | None = None  # trials that the run had when it was to end; None unless --resume adds some


class Driver:
    """One driver of a run: its stages, its observers, and what it leaves behind however it ends."""

    def __init__(self, prepared: Prepared, cluster: "Cluster", screen: Screen, interruption: Interruption) -> None:
        from nkat_ray.report.tensorboard import TensorBoardLog  # loading it takes longer than refusing a flag

        config, storage = prepared.config, prepared.storage
        self._config, self._cluster, self._screen, self._interruption = config, cluster, screen, interruption
        space = prepared.space.domains
        self._run = Run(
            config=config, domains=space, datasets=prepared.datasets, storage=storage,
            journal=Journal(storage.local), warm=prepared.earlier.trials,
        )  # fmt: skip
        self._board = TensorBoardLog(storage.local / TENSORBOARD_FOLDER, space, config.trial)
        self._progress = Progress(config, prepared.datasets, console=screen)
        self._observer: Observer = Observers(
            [NoticesInJournal(self._run), self._progress, self._board, Snapshots(self._run)]
        )
        self._notices = [line for line in (prepared.earlier.notice, *_projected(config, space)) if line]
        self._began_s, self._extended_from = prepared.began_s, prepared.extended_from
        self._disk_is_full = False

    def drive(self, where: str) -> int:
        """Run, or run on, to the end; return the exit code. Whatever ends it, the tables and the report are written."""
        (self._run.folder / SUMMARY_FILE).unlink(missing_ok=True)  # of an earlier driver
        self._run.journal.write("run", began_s=self._began_s)
        if self._extended_from is not None:
            self._extend(self._extended_from)
        code = FAULT
        try:
            with self._progress:
                code = self._stages(where)
        except (KeyboardInterrupt, Interrupted):
            code = INTERRUPTED
        except Exception as error:
            self._log_fault(error)
        with self._interruption.deferred():
            try:
                with self._screen.phase("writing the report"):
                    self._finish(code)
                print_report(self._run.folder, self._screen)
            except Exception as error:
                self._log_fault(error)
                code = code if code == INTERRUPTED else FAULT
        if code == INTERRUPTED:
            own = self._config.storage_path != default_storage_path()
            path = ["--storage_path", self._config.storage_path] if own else []
            command = command_line(["python", "tune_round2.py", "--resume", "--name", str(self._config.name), *path])
            self._screen.print(f"interrupted; continue with: {command}", markup=False, soft_wrap=True)
        return code

    def _extend(self, before: int) -> None:
        """Reopen a run for more trials; survivors that were tested are not tested again."""
        tested = bool(self._run.state.tested)
        self._run.journal.write("extended", num_samples=self._config.num_samples)
        known = "; test scores of its survivors were known by then" if tested else ""
        text = f"{scoring.EXTENDED} from {before} to {self._config.num_samples} trials{known}"
        self._run.journal.write("notice", text=text)

    def _stages(self, where: str) -> int:
        from nkat_ray.cluster.resources import room
        from nkat_ray.search.stage1 import Stage1
        from nkat_ray.search.vault import open_vault
        from nkat_ray.stage2.stage2 import Stage2

        run, cluster, state = self._run, self._cluster, self._run.state
        there = room(self._config, cluster, corner_configs(self._config, run.domains))
        self._observer.on_notice(f"{where}: {cluster.cpus} CPU, {cluster.gpus:g} GPU, {there.slots} trials at a time")
        for text in there.notices:
            self._observer.on_notice(text)
        vault = open_vault(str(self._config.name))
        stage2 = Stage2(run, cluster=cluster, vault=vault, observer=self._observer)
        if not state.stage1_done:
            for line in self._notices:
                self._observer.on_notice(line)
            Stage1(
                run, self._stage1_data(), cluster=cluster, vault=vault, observer=self._observer,
                validation=stage2.validation if self._config.feedback == "global" else None,
                interruption=self._interruption,
            ).run()  # fmt: skip
        if not state.survivors(self._config.gate):
            return NO_SURVIVOR
        if scoring.datasets_counted(state.tested.values(), stage2.run()) == 0:
            raise RuntimeError(
                "Stage 2 ended without a single dataset that counts; stage2.parquet has each one's error"
            )
        return DONE

    def _stage1_data(self) -> Any:
        """Return CIFAR-10 for the trials, and show an augmented batch of it in TensorBoard."""
        from nkat_ray.explain.pictures import augmented_batch
        from nkat_ray.search.trainable import Stage1Data

        found = self._stage1_dataset
        data = Stage1Data(**vars(found.traits), selection=select_images(found, training_limits(found, self._config)))
        picture = augmented_batch(
            self._config, data.selection, num_classes=data.num_classes, flip=data.flip, seed=self._config.seed
        )
        self._board.samples({"augmented_batch": picture})
        return data

    @property
    def _stage1_dataset(self) -> Dataset:
        found = self._run.datasets[STAGE1_DATASET]
        assert isinstance(found, Dataset)  # data/suite.py refuses a run without it
        return found

    def _finish(self, code: int) -> None:
        """Write all files of a run that has ended or was interrupted; the summary is the last."""
        from nkat_ray.report.html import write_report  # loads plotly

        run, folder = self._run, self._run.folder
        write_tables(folder, run.config, run.state)
        summary = summarise(run.config, run.state, describe_data(run.datasets), code)
        self._board.stage2(summary, stage2_rows(run.state), curve_rows(run.state), self._winner_pictures(summary))
        self._board.close()
        write_report(folder, summary=summary)
        run.journal.close()
        run.storage.push()
        tables.write_summary(folder / SUMMARY_FILE, summary)
        run.storage.push()

    def _winner_pictures(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Return pictures of the winner's attention, by tag; none without a winner."""
        from nkat_ray.explain.pictures import winner_attention
        from nkat_ray.train.checkpoint import Weights

        if summary["winner"] is None:
            return {}
        weights = Weights.from_bytes((self._run.folder / BEST_FOLDER / WEIGHTS_FILE).read_bytes())
        found = self._stage1_dataset
        return winner_attention(weights, found, training_limits(found, self._config))

    def _log_fault(self, error: Exception) -> None:
        """Report an internal error: print one line, and write the traceback into a file."""
        log, said = self._run.folder / ERROR_FILE, one_line("".join(traceback.format_exception(error)))
        if f"[Errno {errno.ENOSPC}]" in said:  # Tune wraps what a callback raises: only the text is left
            if self._disk_is_full:
                return  # said once, though every later file fails too
            self._disk_is_full, said = True, self._full_disk(error)
        try:
            log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            said += f"; the log is {log}"
        except OSError as unwritten:  # the disk that is full may be what this is about
            said += f"; there is no log ({unwritten.strerror})"
        self._screen.fault(said)

    def _full_disk(self, error: Exception) -> str:
        """Say which disk is full, what a checkpoint takes, and what to do."""
        where = Path(getattr(error, "filename", None) or self._run.folder)
        free = shutil.disk_usage(where if where.exists() else self._run.folder).free
        rows = (row for record in self._run.state.trials.values() for row in record.curve.values())
        largest = max((row["parameters"] for row in rows), default=0)
        needed = f"a checkpoint takes up to {CHECKPOINT_BYTES * largest / 1e6:.0f} MB" if largest else "more is needed"
        return f"no space left on the disk of {where}: {free / 1e6:.0f} MB free, {needed}; make room, then --resume"


def _projected(config: RunConfig, space: Mapping[str, Any]) -> list[str]:
    """Return one notice if Round-1's best does not lie in the space as it was."""
    changes = round1_point(config, space)[1]
    return [f"Round-1's best is projected onto this space: {'; '.join(changes)}"] if changes else []
