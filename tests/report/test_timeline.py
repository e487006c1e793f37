"""Where the time went: lanes without overlap, and phases that leave nothing out."""

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest

from nkat_ray.record.run_folder import RecordedRun, load_run
from nkat_ray.report.timeline import STAGE2, pack_lanes, phases, timeline, work_of


def test_lanes_never_overlap_and_are_as_few_as_trials_at_once() -> None:
    rng = random.Random(3)
    spans = {
        n: (f"node{rng.randrange(2)}", start := rng.uniform(0, 100), start + rng.uniform(0, 30)) for n in range(60)
    }
    lanes = pack_lanes(spans)
    for a, b in itertools.combinations(spans, 2):
        if lanes[a] == lanes[b]:
            assert spans[a][2] <= spans[b][1] + 1e-6 or spans[b][2] <= spans[a][1] + 1e-6
    for node in ("node0", "node1"):
        mine = [span for span in spans.values() if span[0] == node]
        at_once = max(sum(start <= span[1] < end for _, start, end in mine) for span in mine)
        assert len({lane for lane in lanes.values() if lane[0] == node}) == at_once
        assert all(lanes[trial][0] == spans[trial][0] for trial in spans)


@pytest.fixture
def timed(make_run: Callable[..., Any]) -> RecordedRun:
    """A run whose Stage 2 began 10 s after Stage 1 and took 30 s per dataset, one after the other."""
    run = load_run(make_run().folder)
    last = max(row["started_s"] + row["wall_s"] for row in run.trials)
    stage2 = [
        {**row, "started_s": last + 10 + 30 * n, "seconds": 30.0, "node": "10.0.0.1"}
        for n, row in enumerate(row for row in run.stage2 if row["trial"] == 0)
    ]
    trials = [{**row, "started_s": row["started_s"] + 18.0} for row in run.trials]
    return dataclasses.replace(run, trials=trials, stage2=stage2, summary={**run.summary, "wall_s": last + 200.0})


def test_the_phases_take_the_whole_run(timed: RecordedRun) -> None:
    found = phases(timed)
    assert [name for name, *_ in found] == ["start", "Stage 1", "Stage 2", "test and report"]
    assert found[0][1:] == (0.0, 18.0)
    assert found[-1][2] == timed.summary["wall_s"]
    assert all(a[2] == b[1] for a, b in itertools.pairwise(found))


def test_stage_2_and_the_start_are_drawn(timed: RecordedRun) -> None:
    traces = timeline(timed).data
    assert sum(len(trace.y) for trace in traces if trace.name == STAGE2 and trace.showlegend) == 4
    assert traces[-1].text == ("start", "Stage 1", "Stage 2", "test and report")
    assert any("CIFAR-10 of trial 0: 30 s" in said for trace in traces for said in trace.customdata)


def test_a_table_without_starting_times_says_no_more_than_it_knows(timed: RecordedRun) -> None:
    old = dataclasses.replace(timed, stage2=[{**row, "started_s": None} for row in timed.stage2])
    assert [name for name, *_ in phases(old)] == ["start", "Stage 1", "afterwards"]


def test_a_run_that_goes_on_has_no_end_yet(make_run: Callable[..., Any]) -> None:
    run = load_run(make_run(running=True).folder)
    assert [name for name, *_ in phases(run)] == ["start", "Stage 1"]
    assert len(work_of(run)) == len(run.trials)
    assert phases(dataclasses.replace(run, trials=())) == []
