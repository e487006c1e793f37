import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from nkat_ray.config import RunConfig
from nkat_ray.files import STUDY_FILE
from nkat_ray.record.journal import Journal, TrialRecord, WarmTrial
from nkat_ray.record.run import Run
from nkat_ray.record.storage import RunStorage
from nkat_ray.search.outcome import GATE_CONSTRAINT
from nkat_ray.search.searcher import STUDY_NAME, GatedOptunaSearch, Pace, trial_seed
from nkat_ray.space import SPACES, Choice, Domain, Span

ROUND2 = SPACES["round2"]
POINTS = (
    {"patch_size": 2, "conv_stem": "tiny", "embed_dim": 384, "depth": 7, "temperature": 0.65, "top_p": 0.80},
    {"patch_size": 4, "conv_stem": "off", "embed_dim": 384, "depth": 5, "temperature": 0.6, "top_p": 0.80},
)
GATE = 0.6
NAN = math.nan
COMPLETE, PRUNED, FAIL, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING


@dataclass
class FakePace(Pace):
    """A pace whose answers are set, as constants or functions."""

    answers: dict[str, Any] = field(default_factory=dict)

    def __getattribute__(self, name: str) -> Any:
        answers = object.__getattribute__(self, "answers")
        if name in answers:
            return answers[name]
        return object.__getattribute__(self, name)


class Driver:
    """A searcher on a folder with its journal, told what Tune and the stage would tell it."""

    def __init__(
        self, folder: Path, *, space: Mapping[str, Domain] = ROUND2, points: Any = (), warm: Any = (), **options: Any
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.journal = Journal(folder)
        pace = {
            key: options.pop(key) for key in ("slots", "closed", "holds", "score", "seconds_left") if key in options
        }
        run = Run(
            config=RunConfig(**{"gate": GATE, **options}), domains=space, datasets={}, journal=self.journal,
            storage=RunStorage(folder, None), warm=warm,
        )  # fmt: skip
        self.searcher = GatedOptunaSearch(run, points=points, pace=FakePace(pace))

    def suggest(self) -> dict[str, Any]:
        proposal = self.searcher.suggest(f"tune-{np.random.default_rng().integers(2**60)}")
        assert isinstance(proposal, dict)
        return proposal

    def params(self) -> dict[str, Any]:
        return {
            k: v
            for k, v in self.suggest().items()
            if k not in ("trial", "seed", "resume_from", "seconds_left", "gpu_kind")
        }

    def report(self, trial: int, scores: list[float]) -> None:
        for epoch, score in enumerate(scores, start=1):
            row = {"epoch": epoch, "local_tpe": score, "val_accuracy": score}
            self.journal.write("result", trial=trial, row=row, checkpoint=f"/c/{trial}/{epoch}")

    def end(self, trial: int, reason: str, *, tell: bool = True) -> None:
        self.journal.write("end", trial=trial, stop_reason=reason, stop_detail=None, error=None)
        if tell:
            self.searcher.tell(self.journal.state.trials[trial])

    def run(self, scores: list[float], reason: str = "finished") -> FrozenTrial:
        """One whole trial; what the study holds of it afterwards."""
        trial = self.suggest()["trial"]
        self.report(trial, scores)
        self.end(trial, reason)
        return self.trials()[self.journal.state.trials[trial].study_number]

    def trials(self) -> list[FrozenTrial]:
        return self.searcher.study.get_trials()


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """Opens drivers on one folder, one after the other (a new one is a restart after a kill)."""
    opened: list[Driver] = []

    def open_one(folder: str = "run", **options: Any) -> Driver:
        opened.append(Driver(tmp_path / folder, **options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.journal.close()


# --- what is proposed -------------------------------------------------------------------------------------------------


def test_the_enqueued_points_come_first_in_their_order(driver: Callable[..., Driver]) -> None:
    run = driver(points=POINTS)
    assert [run.params() for _ in POINTS] == list(POINTS)
    assert run.params() not in POINTS


def test_a_proposal_is_numbered_seeded_and_in_the_journal_before_it_is_handed_out(
    driver: Callable[..., Driver],
) -> None:
    run = driver(seed=5)
    for number in range(3):
        proposal = run.suggest()
        record = run.journal.state.trials[number]
        assert (proposal["trial"], proposal["seed"], proposal["resume_from"]) == (number, trial_seed(5, number), [])
        assert (record.seed, record.study_number) == (proposal["seed"], number)
        assert {name: proposal[name] for name in ROUND2} == record.params


def test_no_more_than_num_samples_are_proposed(driver: Callable[..., Driver]) -> None:
    run = driver(num_samples=2)
    run.suggest()
    run.suggest()
    assert run.searcher.suggest("x") == Searcher.FINISHED
    assert len(run.journal.state.trials) == len(run.trials()) == 2


def test_nothing_new_is_proposed_once_the_time_is_used_up(driver: Callable[..., Driver]) -> None:
    closed = [False]
    run = driver(closed=lambda: closed[0])
    run.suggest()
    closed[0] = True
    assert run.searcher.suggest("x") == Searcher.FINISHED
    assert len(run.trials()) == 1


def test_a_space_of_nothing_still_gives_trials(driver: Callable[..., Driver]) -> None:
    """The user typed every searched parameter: the trials differ in their seeds alone."""
    run = driver(space={}, points=({}, {}))
    proposals = [run.suggest() for _ in range(4)]
    assert [p["trial"] for p in proposals] == [0, 1, 2, 3]
    assert len({p["seed"] for p in proposals}) == 4


def score(params: Mapping[str, Any]) -> float:
    """Something for a sampler to learn: smooth, with the best at small temperature and large depth."""
    stem = ("off", "tiny", "small").index(params["conv_stem"])
    return float(0.5 + 0.02 * params["depth"] - 0.4 * (params["temperature"] - 0.6) ** 2 + 0.01 * stem)


def whole_search(run: Driver, trials: int) -> list[dict[str, Any]]:
    proposals = []
    for _ in range(trials):
        proposals.append(run.suggest())
        run.report(proposals[-1]["trial"], [score(proposals[-1])])
        run.end(proposals[-1]["trial"], "finished")
    return proposals


def test_the_same_seed_gives_the_same_proposals_and_another_one_others(driver: Callable[..., Driver]) -> None:
    one, same, other = (
        whole_search(driver(folder, points=POINTS, seed=seed), 16) for folder, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == same
    assert [p["seed"] for p in one] != [p["seed"] for p in other]
    assert one[2:] != other[2:]


def test_trial_seeds_differ_and_fit_torch() -> None:
    seeds = {trial_seed(run, trial) for run in range(20) for trial in range(100)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert trial_seed(3, 7) == trial_seed(3, 7)


# --- duplicates -------------------------------------------------------------------------------------------------------

SMALL: Mapping[str, Domain] = {"stem": Choice(("off", "tiny")), "patch": Choice((2, 4)), "depth": Span(5, 6, step=1)}


def test_a_small_space_is_exhausted_before_anything_is_repeated(driver: Callable[..., Driver]) -> None:
    run = driver(space=SMALL)
    seen = []
    for _ in range(8):
        proposal = run.suggest()
        seen.append(tuple(proposal[name] for name in SMALL))
        run.report(proposal["trial"], [0.5])
        run.end(proposal["trial"], "finished")
    assert len(set(seen)) == 8
    assert len(run.trials()) >= 8
    repeated = run.trials()
    assert all(trial.state is not RUNNING for trial in repeated)
    run.suggest()  # nothing new is left: repeated rather than nothing


def test_a_duplicate_proposal_gets_the_result_of_the_first(driver: Callable[..., Driver], monkeypatch: Any) -> None:
    run = driver(space=SMALL)
    ended = {
        "finished": run.run([0.3, 0.7], "finished"),
        "gate": run.run([0.3, 0.4], "gate"),
        "nan": run.run([NAN], "nan"),
    }
    running = run.suggest()
    twins = [*(trial.params for trial in ended.values()), {name: running[name] for name in SMALL}]
    rest = next(
        params
        for stem in ("off", "tiny") for patch in (2, 4) for depth in (5, 6)
        if (params := {"stem": stem, "patch": patch, "depth": depth}) not in twins
    )  # fmt: skip
    before = len(run.trials())
    for params in [*twins, rest]:  # the next draws of the sampler
        run.searcher.study.enqueue_trial(params)
    assert run.params() == rest
    for (reason, first), again in zip(ended.items(), run.trials()[before : before + 3], strict=True):
        assert again.params == first.params
        assert (again.state, again.value) == (first.state, first.value), reason
        assert again.intermediate_values == first.intermediate_values
        assert again.constraints == first.constraints
    assert run.trials()[before + 3].state is FAIL  # its twin still runs: nothing is known yet
    assert len(run.journal.state.trials) == 5


# --- what the study is told -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "reason", "state", "value"),
    [
        ([0.5, 0.65, 0.62], "finished", COMPLETE, 0.65),  # the best, not the last
        ([0.5, 0.65], "asha", COMPLETE, 0.65),  # a survivor that ASHA stopped
        ([0.65, NAN], "budget", COMPLETE, 0.65),
        ([0.3, 0.4, 0.35], "asha", PRUNED, 0.35),
        ([0.3, 0.4], "smoke", PRUNED, 0.4),
        ([0.3, 0.4, 0.35], "gate", PRUNED, 0.35),
        ([0.3], "budget", PRUNED, 0.3),
        ([], "budget", FAIL, None),
        ([NAN], "nan", FAIL, None),
        ([0.5, 0.65, NAN], "nan", FAIL, None),
        ([0.5], "error", FAIL, None),
        ([], "error", FAIL, None),
    ],
)
def test_ends(driver: Callable[..., Driver], scores: list[float], reason: str, state: Any, value: float | None) -> None:
    frozen = driver().run(scores, reason)
    assert (frozen.state, frozen.value) == (state, value)
    finite = {epoch: s for epoch, s in enumerate(scores, start=1) if math.isfinite(s)}
    assert frozen.intermediate_values == finite
    assert frozen.user_attrs["stop_reason"] == reason
    assert frozen.user_attrs["trial"] == 0
    assert frozen.datetime_complete is not None


@pytest.mark.parametrize(
    ("scores", "reason", "constraint"),
    [
        ([0.5, 0.7], "finished", -0.1),
        ([0.6], "asha", 0.0),  # passed: the gate has spoken
        ([0.7], "nan", -0.1),
        ([0.3, 0.5], "gate", 0.1),
        ([0.3], "smoke", 0.3),
        ([0.3], "asha", None),  # stopped before the gate was judged
        ([0.3], "budget", None),
        ([0.3], "nan", None),
        ([0.3], "error", None),
        ([NAN], "nan", None),
        ([], "error", None),
    ],
)
def test_the_constraint_is_set_where_the_gate_was_judged(
    driver: Callable[..., Driver], scores: list[float], reason: str, constraint: float | None
) -> None:
    frozen = driver().run(scores, reason)
    assert frozen.constraints.get(GATE_CONSTRAINT) == (None if constraint is None else pytest.approx(constraint))


def test_telling_twice_changes_nothing(driver: Callable[..., Driver]) -> None:
    run = driver()
    first = run.run([0.3, 0.7])
    run.searcher.tell(run.journal.state.trials[0])
    assert run.trials() == [first]


def test_tunes_own_ends_tell_nothing_by_themselves(driver: Callable[..., Driver]) -> None:
    """OptunaSearch would tell COMPLETE here, before the reason is known."""
    run = driver()
    run.searcher.suggest("t")
    run.searcher.on_trial_result("t", {"epoch": 1, "local_tpe": 0.3})
    run.searcher.on_trial_complete("t", {"epoch": 1, "local_tpe": NAN})
    run.searcher.on_trial_complete("t", None, error=True)
    (frozen,) = run.trials()
    assert (frozen.state, frozen.intermediate_values) == (RUNNING, {})


def test_it_pickles_as_nothing(driver: Callable[..., Driver], tmp_path: Path) -> None:
    """Tune's snapshots pickle it; the study and the journal are the state."""
    run = driver()
    assert run.searcher.__getstate__() == {}
    pickle.dumps(run.searcher)
    run.searcher.save(str(tmp_path / "snapshot"))
    assert not (tmp_path / "snapshot").exists()


# --- after a kill -----------------------------------------------------------------------------------------------------


def test_an_unfinished_trial_is_continued_first_with_its_checkpoints_newest_first(
    driver: Callable[..., Driver],
) -> None:
    before = driver(points=POINTS)
    proposals = [before.suggest() for _ in range(3)]
    before.report(0, [0.3, 0.4])
    before.report(1, [0.3])
    before.end(1, "asha")
    after = driver(points=POINTS)
    assert after.suggest() == {**proposals[0], "resume_from": ["/c/0/2", "/c/0/1"]}
    assert after.suggest() == proposals[2]
    assert after.suggest()["trial"] == 3
    assert len(after.trials()) == 4
    after.end(0, "gate")
    assert after.trials()[0].state is PRUNED
    assert after.trials()[0].intermediate_values == {1: 0.3, 2: 0.4}


def test_unfinished_trials_are_continued_even_though_all_were_proposed(driver: Callable[..., Driver]) -> None:
    before = driver(num_samples=2)
    before.suggest()
    before.suggest()
    after = driver(num_samples=2)
    assert [after.suggest()["trial"] for _ in range(2)] == [0, 1]
    assert after.searcher.suggest("x") == Searcher.FINISHED


def test_an_unreported_end_is_reported_by_the_next_driver(driver: Callable[..., Driver]) -> None:
    before = driver()
    before.suggest()
    before.report(0, [0.5, 0.7])
    before.end(0, "finished", tell=False)  # killed here
    assert before.trials()[0].state is RUNNING
    after = driver()
    (frozen,) = after.trials()
    assert (frozen.state, frozen.value, frozen.intermediate_values) == (COMPLETE, 0.7, {1: 0.5, 2: 0.7})


class Killed(BaseException):
    pass


def killed(*_: Any, **__: Any) -> None:
    raise Killed


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_proposal_that_the_journal_never_saw_is_made_again(
    driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = driver(points=POINTS)
    for _ in range(number):
        before.suggest()
    monkeypatch.setattr(before.journal, "write", killed)
    with pytest.raises(Killed):
        before.suggest()
    after = driver(points=POINTS)
    states = [trial.state for trial in after.trials()]
    assert states == [RUNNING] * number + [FAIL]
    proposals = [after.suggest() for _ in range(number + 2)]
    assert [p["trial"] for p in proposals] == list(range(number + 2))
    assert [{name: p[name] for name in ROUND2} for p in proposals[:2]] == list(POINTS)[: number + 2]
    assert len(set(map(str, (r.params for r in after.journal.state.trials.values())))) == number + 2


def test_a_point_that_was_enqueued_and_never_asked_for_leaves_no_zombie(
    driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = driver(points=POINTS)
    before.suggest()
    monkeypatch.setattr(before.searcher.study, "ask", killed)
    with pytest.raises(Killed):
        before.suggest()
    assert before.trials()[1].state is TrialState.WAITING
    after = driver(points=POINTS)
    assert [trial.state for trial in after.trials()] == [RUNNING, FAIL]
    assert [after.params() for _ in range(2)] == list(POINTS)
    assert after.params() not in POINTS
    assert len(after.journal.state.trials) == 3


def test_no_trial_is_left_running_when_all_have_ended(driver: Callable[..., Driver]) -> None:
    """Three drivers, killed at awkward moments: in the end every trial of the study is finished."""
    first = driver(points=POINTS, num_samples=6)
    for _ in range(3):
        first.suggest()
    first.report(0, [0.7])
    first.end(0, "finished", tell=False)
    second = driver(points=POINTS, num_samples=6)
    second.suggest()
    second.suggest()
    second.suggest()
    second.end(1, "error")
    third = driver(points=POINTS, num_samples=6)
    while isinstance(third.searcher.suggest("x"), dict):
        pass
    for record in third.journal.state.trials.values():
        if not record.ended:
            third.report(record.trial, [0.3])
            third.end(record.trial, "asha")
    assert sorted(third.journal.state.trials) == list(range(6))
    assert all(trial.state.is_finished() for trial in third.trials())


def test_a_resumed_search_does_not_draw_the_first_ones_again(driver: Callable[..., Driver]) -> None:
    before = whole_search(driver(), 5)
    after = whole_search(driver(), 5)
    drawn = [tuple(p[name] for name in ROUND2) for p in before + after]
    assert len(set(drawn)) == 10


@pytest.mark.parametrize("cut", [1, 9, 60])
def test_a_study_whose_last_line_was_cut_short_goes_on(
    driver: Callable[..., Driver], tmp_path: Path, recwarn: pytest.WarningsRecorder, cut: int
) -> None:
    """A machine that lost its power while Optuna wrote."""
    before = driver()
    before.run([0.4], "gate")
    before.suggest()
    before.report(1, [0.3, 0.7])
    before.end(1, "finished")
    path = tmp_path / "run" / STUDY_FILE
    path.write_bytes(path.read_bytes()[:-cut])
    after = driver()
    assert [trial.state for trial in after.trials()] == [PRUNED, COMPLETE]  # told again
    assert not [warning for warning in recwarn if "already reported" in str(warning.message)]
    after.run([0.5, 0.65])
    assert [trial.value for trial in driver().trials()] == [0.4, 0.7, 0.65]


# --- the study's file -------------------------------------------------------------------------------------------------


def test_the_study_opens_with_optuna_alone(driver: Callable[..., Driver], tmp_path: Path) -> None:
    run = driver(points=POINTS)
    run.run([0.3, 0.7])
    run.run([0.4], "gate")
    study = optuna.load_study(
        study_name=STUDY_NAME, storage=JournalStorage(JournalFileBackend(str(tmp_path / "run" / STUDY_FILE)))
    )
    assert study.direction is optuna.study.StudyDirection.MAXIMIZE
    assert study.best_value == 0.7
    assert study.best_params == POINTS[0]
    assert [trial.state for trial in study.trials] == [COMPLETE, PRUNED]


def test_the_sampler_prefers_what_passes_the_gate(driver: Callable[..., Driver]) -> None:
    """The constraint reaches TPESampler: with every high score infeasible it looks elsewhere."""
    run = driver(space={"x": Span(0.0, 1.0)}, num_samples=200)
    for _ in range(40):
        proposal = run.suggest()
        passes = proposal["x"] < 0.3
        run.report(proposal["trial"], [0.65 if passes else 0.2 + 0.3 * proposal["x"]])
        run.end(proposal["trial"], "finished" if passes else "gate")
    late = [record.params["x"] for record in list(run.journal.state.trials.values())[25:]]
    assert np.mean([x < 0.3 for x in late]) > 0.6


@pytest.mark.parametrize("sampler", ["random", "gp"])
def test_every_sampler_searches_and_goes_on_after_a_restart(driver: Callable[..., Driver], sampler: str) -> None:
    first = whole_search(driver("a", sampler=sampler, seed=3), 11)
    assert first == whole_search(driver("b", sampler=sampler, seed=3), 11)
    after = whole_search(driver("a", sampler=sampler, seed=3), 2)
    drawn = [tuple(p[name] for name in ROUND2) for p in first + after]
    assert len(set(drawn)) == 13


# --- what is told later, and holding back -----------------------------------------------------------------------------


def test_a_survivor_is_reported_as_soon_as_its_score_is_known(driver: Callable[..., Driver]) -> None:
    known: dict[int, float] = {}
    run = driver(score=lambda record: known.get(record.trial))
    for scores, reason in (([0.7], "finished"), ([0.8], "asha"), ([0.3], "gate"), ([0.9], "nan")):
        trial = run.suggest()["trial"]
        run.report(trial, scores)
        run.end(trial, reason)
    assert [trial.state for trial in run.trials()] == [RUNNING, RUNNING, PRUNED, FAIL]
    known.update({0: 0.41, 1: NAN})
    for record in run.journal.state.trials.values():
        run.searcher.tell(record)
    assert [(trial.state, trial.value) for trial in run.trials()[:2]] == [(COMPLETE, 0.41), (FAIL, None)]
    assert run.trials()[0].constraints[GATE_CONSTRAINT] == pytest.approx(-0.1)  # of Local TPE, as ever


def test_an_unreported_survivor_is_reported_by_the_next_driver(driver: Callable[..., Driver]) -> None:
    before = driver(score=lambda _: None)
    before.run([0.7])
    assert before.trials()[0].state is RUNNING
    (frozen,) = driver(score=lambda _: 0.43).trials()
    assert (frozen.state, frozen.value) == (COMPLETE, 0.43)


def test_waiting_proposes_nothing_new_but_continues_unfinished_trials(driver: Callable[..., Driver]) -> None:
    held = [False]
    first = driver(holds=lambda: held[0], num_samples=3)
    first.suggest()
    held[0] = True
    assert first.searcher.suggest("x") is None
    after = driver(holds=lambda: held[0], num_samples=3)
    assert after.suggest()["trial"] == 0  # it has its slot from before
    assert after.searcher.suggest("x") is None
    held[0] = False
    assert [after.suggest()["trial"] for _ in range(2)] == [1, 2]
    held[0] = True
    assert after.searcher.suggest("x") == Searcher.FINISHED  # nothing is left to hold back


# --- warm start -------------------------------------------------------------------------------------------------------


def warm(number: int, scores: list[float], reason: str, worth: float | None = None, **params: Any) -> WarmTrial:
    curve = {e: {"epoch": e, "local_tpe": s, "lambda_theory": 20.0} for e, s in enumerate(scores, start=1)}
    record = TrialRecord(number, {**POINTS[0], **params}, 1, -1, curve=curve, stop_reason=reason)
    return WarmTrial(name=f"round1/{number}", record=record, score=max(scores) if worth is None else worth)


WARM = [
    warm(0, [0.5, 0.7], "finished", depth=6),
    warm(1, [0.3, 0.4], "gate", depth=8),
    warm(2, [0.2], "asha", depth=9),
    warm(3, [0.7], "nan"),
]


def test_an_earlier_runs_trials_are_judged_by_this_runs_gate_and_are_not_its_own(
    driver: Callable[..., Driver],
) -> None:
    run = driver(warm=WARM)
    told = run.trials()
    assert [trial.user_attrs["warm_start"] for trial in told] == ["round1/0", "round1/1", "round1/2"]
    assert [(trial.state, trial.value) for trial in told] == [(COMPLETE, 0.7), (PRUNED, 0.4), (PRUNED, 0.2)]
    assert [trial.constraints.get(GATE_CONSTRAINT) for trial in told] == [pytest.approx(-0.1), pytest.approx(0.2), None]
    assert told[0].intermediate_values == {1: 0.5, 2: 0.7}
    assert run.journal.state.trials == {}
    assert run.suggest()["trial"] == 0
    assert run.journal.state.trials[0].study_number == 3


def test_they_are_added_once_even_if_a_driver_was_killed_halfway(driver: Callable[..., Driver]) -> None:
    driver(warm=WARM[:1])
    again = driver(warm=WARM)
    assert [trial.user_attrs["warm_start"] for trial in again.trials()] == ["round1/0", "round1/1", "round1/2"]
    assert len(driver(warm=WARM).trials()) == 3


def test_a_stricter_gate_makes_an_earlier_survivor_infeasible(driver: Callable[..., Driver]) -> None:
    (frozen,) = driver(warm=WARM[:1], gate=0.9).trials()
    assert frozen.constraints[GATE_CONSTRAINT] == pytest.approx(0.2)


def test_what_an_earlier_survivor_is_worth_may_be_global_tpe(driver: Callable[..., Driver]) -> None:
    assert driver(warm=[warm(0, [0.7], "finished", 0.44)]).trials()[0].value == 0.44


def test_what_only_an_earlier_run_has_had_is_tried_again(driver: Callable[..., Driver]) -> None:
    run = driver(warm=WARM, points=(POINTS[1],))
    run.suggest()
    run.searcher.study.enqueue_trial(WARM[0].record.params)
    assert run.params() == WARM[0].record.params


def test_the_sampler_learns_from_them(driver: Callable[..., Driver]) -> None:
    space = {"x": Span(0.0, 1.0)}
    trials = []
    for number, x in enumerate(np.linspace(0, 1, 40)):
        one = warm(number, [0.65 if x < 0.25 else 0.3], "finished" if x < 0.25 else "gate")
        one.record.params.clear()
        one.record.params["x"] = float(x)
        trials.append(one)
    run = driver(space=space, warm=trials, num_samples=100)
    drawn = [run.suggest()["x"] for _ in range(10)]
    assert np.mean([x < 0.3 for x in drawn]) > 0.6
