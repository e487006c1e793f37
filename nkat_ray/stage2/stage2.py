"""Stage 2: find the winner among the survivors; test images are read once (docs/spec.md section 6.3).

validate every survivor on every dataset -> rank by validation -> test every survivor -> keep the winner
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ray.actor import ActorHandle

from nkat_ray.cluster.resources import Cluster
from nkat_ray.config import STAGE1_DATASET
from nkat_ray.data import Dataset
from nkat_ray.files import BEST_FOLDER
from nkat_ray.record import scoring
from nkat_ray.record.journal import Key
from nkat_ray.record.observer import Observer
from nkat_ray.record.run import Run
from nkat_ray.record.tables import Row
from nkat_ray.stage2.survivor import Survivor, survivor_of
from nkat_ray.stage2.testing import score_on_test
from nkat_ray.stage2.validation import Validation
from nkat_ray.stage2.weights import transferred_file, weights_on_disk


class Stage2:
    """Stage 2 of one run; work that an earlier driver finished is not repeated.

    Attributes:
        validation: the validation, which Stage 1 uses too with `--feedback global`.
    """

    def __init__(self, run: Run, *, cluster: Cluster, vault: ActorHandle[Any], observer: Observer) -> None:
        self._run, self._cluster, self._observer = run, cluster, observer
        self.validation = Validation(run, cluster=cluster, vault=vault, observer=observer)

    def run(self) -> int:
        """Evaluate every trial that passed the gate; return the winner's number."""
        state, config = self._run.state, self._run.config
        numbers = state.survivors(config.gate)
        return self.evaluate([survivor_of(state.trials[number], config, self._cluster) for number in numbers])

    def evaluate(self, survivors: Sequence[Survivor]) -> int:
        """Validate, rank and test survivors; write `best/`; return the winner's number.

        The ranking is fixed, by validation scores, before any test image is read.
        """
        state, by_trial = self._run.state, {survivor.trial: survivor for survivor in survivors}
        done = state.stage2 if state.order else self._valid_rows(survivors)
        rows = [*done.values(), *state.tested.values()]
        self._observer.on_stage2_start(list(by_trial), list(self._run.datasets), rows)
        self.validation.send(survivors, done)
        self.validation.finish(survivors)
        if not state.order:
            lambdas = {trial: s.lambdas()[self._run.config.lambda_model] for trial, s in by_trial.items()}
            self._run.journal.write("ranked", order=scoring.rank(state.stage2.values(), lambdas))
        score_on_test(self._run, by_trial, self._observer)
        self._save_best(by_trial[state.order[0]])
        return state.order[0]

    def _valid_rows(self, survivors: Sequence[Survivor]) -> dict[Key, Row]:
        """Return the validation rows that need no repetition: of the survivors' best weights, and not interrupted."""
        rows: dict[Key, Row] = {}
        for survivor in survivors:
            rows |= self._run.state.validated(survivor.trial, survivor.epoch)
        return {key: row for key, row in rows.items() if not _was_interrupted(row)}

    def _save_best(self, winner: Survivor) -> None:
        """Write `best/`: the winner's network as trained on CIFAR-10.

        Raises:
            FileNotFoundError: its weights are neither below `stage2/` nor in a checkpoint.
        """
        from nkat_ray.train.checkpoint import Weights
        from nkat_ray.train.transfer import save_weights

        path, dataset = (
            transferred_file(self._run.folder, winner.trial, STAGE1_DATASET),
            self._run.datasets[STAGE1_DATASET],
        )
        weights = path.read_bytes() if path.exists() else weights_on_disk(winner.checkpoints)
        if weights is None:
            raise FileNotFoundError(f"the weights of trial {winner.trial} are neither in {path} nor in a checkpoint")
        names = dataset.class_names if isinstance(dataset, Dataset) else ()
        save_weights(Weights.from_bytes(weights), weights, self._run.folder / BEST_FOLDER, class_names=names)


def _was_interrupted(row: Mapping[str, Any]) -> bool:
    """Return whether a validation ended with the death of its worker or node, so that it should be repeated."""
    return row["status"] == "failed" and row["val_accuracy"] is None
