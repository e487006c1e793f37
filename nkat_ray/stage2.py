"""Stage 2 from the survivors to the winner: what it keeps, and in which order (docs/spec.md section 6.3).

evaluate.py computes; here every row goes into the journal and every network onto the disk, weights first, so that a
driver that is killed loses nothing that was finished.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nkat_ray.config import STAGE1_DATASET, RunConfig
from nkat_ray.files import BEST_FOLDER, STAGE2_FOLDER, WEIGHTS_FILE, write_atomically
from nkat_ray.prepare import Datasets
from nkat_ray.report import results
from nkat_ray.report.progress import Progress
from nkat_ray.search.journal import Journal, RunState, TrialRecord


def evaluate_survivors(
    survivors: Sequence[Any],
    datasets: Datasets,
    *,
    config: RunConfig,
    vault: Any,
    journal: Journal,
    folder: Path,
    progress: Progress,
    notice: Callable[[str], None],
    on_row: Callable[[], None] = lambda: None,
) -> int:
    """Stage 2 from the survivors to the winner; rows go into the journal, weights below `folder`. Returns the winner.

    The ranking is fixed, by validation scores, before any test image is read.
    """
    from nkat_ray.evaluate import payload_path, score_on_test, validate_survivors

    state, moved = journal.state, folder / STAGE2_FOLDER
    moved.mkdir(exist_ok=True)
    by_trial = {survivor.trial: survivor for survivor in survivors}
    done = state.stage2 if state.order else _standing(state, survivors)
    progress.stage2_start(2 * len(survivors) * len(datasets) - len(done) - len(state.tested))
    for row, payload in validate_survivors(survivors, datasets, run=config, vault=vault, done=done, notice=notice):
        _keep(row, payload, by_trial[row["trial"]].epoch, folder, journal)
        progress.stage2_done(row["trial"], row["dataset"], row)
        on_row()
    if not state.order:
        lambdas = {trial: survivor.lambdas()[config.lambda_model] for trial, survivor in by_trial.items()}
        journal.write("ranked", order=results.rank(state.stage2.values(), lambdas))
    untested = [row for key, row in state.stage2.items() if key not in state.tested]
    for row in score_on_test(untested, moved, by_trial, datasets, run=config):
        journal.write("tested", row=row)
        progress.stage2_done(row["trial"], row["dataset"], row)
        on_row()
    winner = state.order[0]
    save_best(by_trial[winner], payload_path(moved, winner, STAGE1_DATASET), folder / BEST_FOLDER)
    return winner


def _keep(row: Mapping[str, Any], payload: bytes | None, epoch: int | None, folder: Path, journal: Journal) -> None:
    """A validation row and the weights that it is about: first the weights, so that a row never lacks them."""
    from nkat_ray.evaluate import payload_path

    if payload is not None:
        write_atomically(payload_path(folder / STAGE2_FOLDER, row["trial"], row["dataset"]), payload)
    journal.write("stage2", row=row, epoch=epoch)


def _standing(state: RunState, survivors: Sequence[Any]) -> dict[tuple[int, str], dict[str, Any]]:
    """Validation rows that stand: made with the survivors' best weights, and no worker died of them."""
    rows = {k: row for survivor in survivors for k, row in state.validated(survivor.trial, survivor.epoch).items()}
    return {key: row for key, row in rows.items() if not _faulted(row)}


class EarlyStage2:
    """Stage 2's validation as Stage 1 uses it (`--feedback global`): rows and weights are kept as Stage 2 itself keeps
    them, which then only does what is missing. Test images are not read here."""

    def __init__(
        self,
        datasets: Datasets,
        *,
        config: RunConfig,
        vault: Any,
        journal: Journal,
        folder: Path,
        cluster: Any,
        notice: Callable[[str], None],
    ) -> None:
        from nkat_ray.evaluate import Validation

        self._datasets, self._config, self._journal, self._folder = datasets, config, journal, folder
        self._cluster = cluster
        self._validation = Validation(datasets, run=config, vault=vault, notice=notice)
        self._epochs: dict[int, int | None] = {}  # of the weights that were sent out
        (folder / STAGE2_FOLDER).mkdir(exist_ok=True)

    @property
    def tasks(self) -> int:
        """Tasks that were sent out and have not been collected."""
        return self._validation.tasks

    @property
    def busy(self) -> set[int]:
        """Trials with such tasks."""
        return self._validation.busy

    def submit(self, record: TrialRecord) -> None:
        """Send out what is missing of a survivor's validation, with the best weights that it has now."""
        survivor = survivor_of(record, self._config, self._cluster)
        self._epochs[record.trial] = survivor.epoch
        done = self._journal.state.validated(record.trial, survivor.epoch)
        for row, payload in self._validation.submit([survivor], done):
            _keep(row, payload, survivor.epoch, self._folder, self._journal)

    def collect(self, *, wait: bool) -> None:
        """Write what has been finished into the journal; `wait` until something has."""
        for row, payload in self._validation.collect(wait=wait):
            _keep(row, payload, self._epochs[row["trial"]], self._folder, self._journal)

    def score(self, record: TrialRecord) -> float | None:
        """What Optuna is told of a survivor; None unless all of its validation, with its best weights, is there."""
        rows = self._journal.state.validated(record.trial, record.best_epoch).values()
        return None if len(rows) < len(self._datasets) else results.feedback_score(rows, record.trial)


def _faulted(row: Mapping[str, Any]) -> bool:
    """Whether a worker or its node died of this one: worth another try by the next driver."""
    return row["status"] == "failed" and row["val_accuracy"] is None


def save_best(winner: Any, payload: Path, folder: Path) -> None:
    """Write `best/`: the winner as it was trained on CIFAR-10.

    Raises:
        FileNotFoundError: its weights are neither below `stage2/` nor in a checkpoint.
    """
    from nkat_ray.evaluate import weights_on_disk
    from nkat_ray.train.checkpoint import Weights
    from nkat_ray.train.transfer import save_weights

    weights = payload.read_bytes() if payload.exists() else weights_on_disk(winner.checkpoints)
    if weights is None:
        raise FileNotFoundError(f"the weights of trial {winner.trial} are neither in {payload} nor in a checkpoint")
    save_weights(Weights.from_bytes(weights), weights, folder)


def survivor_of(record: TrialRecord, config: RunConfig, cluster: Any) -> Any:
    """What Stage 2 needs to know of a trial that passed the gate."""
    from nkat_ray.evaluate import Survivor
    from nkat_ray.search.resources import trial_share
    from nkat_ray.search.space import trial_config

    trial, last = trial_config(config, record.params), record.curve[max(record.curve)]
    return Survivor(
        trial=record.trial, epoch=record.best_epoch, checkpoints=record.checkpoints[::-1], conv_stem=trial.conv_stem,
        embed_dim=trial.embed_dim, nkat_parameters=last["nkat_parameters"], parameters=last["parameters"],
        share=trial_share(trial, config, cluster),
    )  # fmt: skip


def model_survivor(folder: Path, config: RunConfig, share: Any, *, trial: int = 0) -> Any:
    """A network in a folder as a survivor of that number, under the configuration that it was trained with."""
    from nkat_ray.evaluate import Survivor
    from nkat_ray.model import count_nkat_parameters, count_parameters
    from nkat_ray.train.checkpoint import Weights

    model = Weights.from_bytes((folder / WEIGHTS_FILE).read_bytes()).build()
    return Survivor(
        trial=trial, checkpoints=[str(folder.absolute())], conv_stem=config.conv_stem, embed_dim=config.embed_dim,
        nkat_parameters=count_nkat_parameters(model), parameters=count_parameters(model), share=share,
    )  # fmt: skip
