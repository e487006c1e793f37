from pathlib import Path

import pytest

from nkat_ray.record.journal import Journal, TrialRecord
from nkat_ray.search.feedback import Feedback
from nkat_ray.signals import Interrupted

GATE, SLOTS = 0.6, 2


class FakeStage2:
    """Two tasks a survivor; the journal holds what `finish` finished."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.sent, self.ready = journal, [], []
        self.epochs: dict[int, int | None] = {}
        self.submitted: list[tuple[int, int | None]] = []

    @property
    def tasks(self) -> int:
        return len(self.sent)

    @property
    def busy(self) -> set[int]:
        return {trial for trial, _ in self.sent}

    def submit(self, record: TrialRecord) -> None:
        self.submitted.append((record.trial, record.best_epoch))
        self.epochs[record.trial] = record.best_epoch
        done = self.journal.state.validated(record.trial, record.best_epoch)
        self.sent += [(record.trial, name) for name in ("mnist", "cifar10") if (record.trial, name) not in done]

    def finish(self, *which: tuple[int, str]) -> None:
        self.ready += which or self.sent

    def collect(self, *, wait: bool) -> None:
        if wait and not self.ready:
            self.finish(self.sent[0])
        for key in self.ready:
            self.sent.remove(key)
            row = {"trial": key[0], "dataset": key[1]}
            self.journal.write("stage2", row=row, epoch=self.epochs[key[0]])
        self.ready = []

    def score(self, record: TrialRecord) -> float | None:
        rows = self.journal.state.validated(record.trial, record.best_epoch)
        return 0.4 + record.trial / 100 if len(rows) == 2 else None


class Loop:
    """What Tune and the callback would do to a Feedback."""

    def __init__(self, folder: Path, *, exhausted: bool = False) -> None:
        self.journal = Journal(folder)
        self.journal.write("run")
        self.stage2, self.told = FakeStage2(self.journal), []
        self.is_exhausted, self.interrupted = exhausted, False
        self.feedback = Feedback(self.stage2, self.journal.state, GATE, self)

    def slots(self) -> int:
        return SLOTS

    def exhausted(self) -> bool:
        return self.is_exhausted

    def tell(self, record: TrialRecord) -> None:
        self.told.append(record.trial)

    def tick(self) -> None:
        if self.interrupted:
            raise Interrupted

    def start(self, trial: int) -> None:
        if trial not in self.journal.state.trials:
            self.journal.write("proposed", trial=trial, params={}, seed=0, study_number=trial)
        self.feedback.on_trial_start(self.journal.state.trials[trial])

    def result(self, trial: int, epoch: int, score: float) -> None:
        self.journal.write("result", trial=trial, row={"epoch": epoch, "local_tpe": score}, checkpoint=None)

    def end(self, trial: int, reason: str = "finished") -> None:
        self.journal.write("end", trial=trial, stop_reason=reason, stop_detail=None, error=None)
        self.feedback.on_end(self.journal.state.trials[trial])


@pytest.fixture
def loop(tmp_path: Path) -> Loop:
    return Loop(tmp_path)


def test_a_survivor_that_ended_is_validated_before_a_new_trial_and_told_when_all_is_known(loop: Loop) -> None:
    loop.start(0)
    loop.start(1)
    loop.result(0, 1, 0.7)
    loop.feedback.advance()
    assert loop.stage2.submitted == []  # no slot is free, and a new trial would take the next
    loop.end(0)
    assert loop.told == []
    assert loop.feedback.holds()
    assert loop.stage2.submitted == [(0, 1)]
    loop.stage2.finish((0, "mnist"))
    assert loop.feedback.holds()  # one trial and one task on two slots
    assert loop.told == []
    loop.stage2.finish((0, "cifar10"))
    assert not loop.feedback.holds()
    assert loop.told == [0]
    loop.feedback.advance()
    assert loop.told == [0]


def test_other_trials_are_reported_at_once_and_occupy_no_slot(loop: Loop) -> None:
    for trial, (score, reason) in enumerate(((0.3, "gate"), (0.2, "asha"), (0.9, "nan"), (0.8, "error"))):
        loop.start(trial)
        loop.result(trial, 1, score)
        loop.end(trial, reason)
        assert not loop.feedback.holds()
    assert loop.told == [0, 1, 2, 3]
    assert loop.stage2.submitted == []


def test_one_that_still_trains_starts_where_no_new_trial_would_and_is_done_again_if_it_got_better(loop: Loop) -> None:
    loop.start(0)
    loop.result(0, 1, 0.7)
    loop.feedback.advance()
    assert loop.stage2.submitted == []  # a slot is free, but a new trial takes it
    loop.is_exhausted = True
    loop.feedback.advance()
    assert loop.stage2.submitted == [(0, 1)]
    loop.stage2.finish()
    loop.feedback.advance()
    assert loop.told == []  # its value is known, but it may get better yet
    loop.result(0, 2, 0.8)
    loop.result(0, 3, 0.75)
    loop.end(0)
    loop.feedback.finish()
    assert loop.stage2.submitted == [(0, 1), (0, 2)]
    assert loop.told == [0]


def test_rows_with_the_final_weights_are_not_made_again(loop: Loop) -> None:
    loop.is_exhausted = True
    loop.start(0)
    loop.result(0, 1, 0.7)
    loop.feedback.advance()
    loop.result(0, 2, 0.65)
    loop.end(0)
    loop.stage2.finish()
    loop.feedback.finish()
    assert loop.stage2.submitted == [(0, 1)]
    assert loop.told == [0]


def test_the_end_waits_for_all(loop: Loop) -> None:
    for trial in range(4):
        loop.start(trial)
        loop.result(trial, 1, 0.7)
        loop.end(trial)
    assert loop.feedback.holds()
    loop.feedback.finish()
    assert sorted(loop.told) == [0, 1, 2, 3]
    assert loop.stage2.tasks == 0
    assert not loop.feedback.holds()


def test_a_restart_goes_on_with_what_is_missing(loop: Loop, tmp_path: Path) -> None:
    for trial in range(3):
        loop.start(trial)
        loop.result(trial, 1, 0.7)
    loop.end(0)
    loop.end(1, "nan")
    loop.feedback.advance()
    loop.stage2.finish((0, "mnist"))
    loop.feedback.advance()
    loop.journal.close()  # killed: trial 0 half validated, trial 2 half trained
    after = Loop(tmp_path)
    after.feedback.advance()
    assert after.stage2.sent == [(0, "cifar10")]
    after.start(2)
    after.result(2, 2, 0.9)
    after.end(2)
    after.feedback.finish()
    assert after.told == [0, 2]
    assert after.stage2.submitted == [(0, 1), (2, 2)]


def test_the_journal_knows_with_which_weights_a_row_was_made(loop: Loop) -> None:
    for dataset, epoch in (("mnist", 3), ("cifar10", 5)):
        loop.journal.write("stage2", row={"trial": 1, "dataset": dataset}, epoch=epoch)
    loop.journal.write("stage2", row={"trial": 2, "dataset": "mnist"})  # of an older version: nobody noted it
    state = loop.journal.state
    assert list(state.validated(1, 5)) == [(1, "cifar10")]
    assert list(state.validated(1, 4)) == []
    assert list(state.validated(2, 9)) == [(2, "mnist")]


def test_an_interrupt_ends_the_wait_between_two_steps(loop: Loop) -> None:
    loop.start(0)
    loop.result(0, 1, 0.7)
    loop.end(0)
    loop.interrupted = True
    with pytest.raises(Interrupted):
        loop.feedback.finish()
    assert loop.told == []
