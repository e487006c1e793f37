"""The final report and the console: 80 columns, full width in a pipe, any encoding, --quiet and --json."""

import contextlib
import io
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nkat_ray.config import RunConfig
from nkat_ray.report.progress import Progress
from nkat_ray.report.terminal import Screen, final_report, plain_table, result_lines
from nkat_ray.report.wording import after_the_fact


def printed(run: Any, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    final_report(run.summary, run.trials, run.stage2, console, folder=run.folder)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("options", [{}, {"gate": 1.0}, {"emnist": None}, {"source": "synthetic suite"}])
def test_final_report_fits_80_columns(make_run: Callable[..., Any], options: dict[str, Any], width: int) -> None:
    run = make_run(**options)
    lines = [line for line in printed(run, width).splitlines() if str(run.folder) not in line]  # paths stay whole
    assert max(map(len, lines)) <= 80


def test_final_report_states_the_figures(make_run: Callable[..., Any]) -> None:
    text = printed(make_run())
    assert "gate 0.42 (preset laptop; the notes' gate is 0.60)" in text
    assert re.search(r"Global TPE \(4 of 4\) +0\.53 +0\.619 \[0\.617, 0\.622\] +>= 0\.70 +-0\.081", text)
    assert re.search(r"MNIST +0\.985 +\.982-\.987 +10000 +0\.91 +0\.723 +0\.69 +0\.72 +0\.67 +0\.87", text)
    assert "asha 2, finished 2, error 1" in text
    assert "Not reached" in text
    assert "trials.parquet" in text


def test_final_report_without_survivor_says_which_accuracy_was_missing(make_run: Callable[..., Any]) -> None:
    text = " ".join(printed(make_run(gate=0.60)).split())
    assert "Trial 5 is closest to the gate, with an accuracy of 0.685." in text
    assert "the gate of 0.60 needs 0.868, 0.183 more" in text


def test_final_report_names_a_missing_dataset_verbatim(make_run: Callable[..., Any]) -> None:
    text = printed(make_run(emnist=None))
    assert "Global TPE (3 of 4)" in text
    assert "EMNIST letters: not found: <script>alert(1)</script>" in text
    assert "Undecided" in text


def with_own_dataset(run: Any, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and rows of a run with `--datasets cifar10 fashion_mnist NAME`: MNIST's rows become those of NAME."""
    rows = [{**row, "dataset": name if row["dataset"] == "mnist" else row["dataset"]} for row in run.stage2]
    asked = (name, "cifar10", "fashion_mnist")
    rows = [row for row in rows if row["dataset"] in asked]
    return {**run.summary, "data": {key: {"source": "made up"} for key in asked}}, rows


# Reported in EleutherAI/lm-evaluation-harness#1112
def test_a_dataset_of_ones_own_is_in_the_table_and_one_that_was_not_asked_for_is_not(
    make_run: Callable[..., Any],
) -> None:
    run = make_run()
    summary, rows = with_own_dataset(run, "leaves")
    console = Console(file=io.StringIO(), width=80)
    final_report(summary, run.trials, rows, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"^leaves +0\.985 +\.982-\.987 +10000 +- +0\.723 +- +0\.72", text, re.MULTILINE)
    assert "missing" not in text
    needed = "Not among --datasets, although the target is about all four: MNIST, EMNIST letters"
    assert needed in " ".join(text.split())


def test_at_chance_is_not_called_failed(make_run: Callable[..., Any]) -> None:
    run = make_run()
    guessed = {
        "status": "failed",
        "test_accuracy": 0.1,
        "val_accuracy": 0.3,
        "tpe": None,
        "error": "at or below 1 / 10",
    }
    rows = [{**row, **guessed} if row["dataset"] == "mnist" else row for row in run.stage2]
    console = Console(file=io.StringIO(), width=80)
    final_report(run.summary, run.trials, rows, console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any(re.match(r"MNIST +0\.100 at chance", line) for line in lines)
    assert "MNIST: at or below 1 / 10" in lines
    assert not any("failed" in line for line in lines)
    assert max(map(len, lines)) <= 80


# Reported in softlayer/softlayer-python#1676, Textualize/rich#501
def test_in_a_pipe_nothing_is_cut(
    make_run: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    run, name = make_run(), "leaves_of_all_trees_of_the_botanical_garden_2025"
    summary, rows = with_own_dataset(run, name)
    screen = Screen()
    assert screen.width > 1000
    final_report(summary, run.trials, rows, screen)
    table = plain_table("Files")
    table.add_row(name, "x" * 200)
    screen.print(table)
    out = capsys.readouterr().out
    assert re.search(rf"^{name} +0\.985 +\.982", out, re.MULTILINE)
    assert f"{name} {'x' * 200}" in out


# Reported in Textualize/rich#826, httpie/cli#1008, Aider-AI/aider#4582
@pytest.mark.parametrize("encoding", ["ascii", "cp932", "latin-1"])
@pytest.mark.parametrize("kind", ["report", "document", "quiet"])
def test_what_the_encoding_cannot_show_is_replaced(
    encoding: str, kind: str, make_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run("日本語-😀/run")
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
    screen = Screen(quiet=kind == "quiet", as_json=kind == "document")
    with screen.kept_clean():
        with screen.phase("読み込み中"):
            final_report(run.summary, run.trials, run.stage2, screen, folder=run.folder)
        screen.conclude({"folder": run.folder}, result_lines(run.summary, run.stage2, run.folder))
    sys.stdout.flush()
    shown = buffer.getvalue().decode(encoding)
    if kind == "document":
        assert json.loads(shown)["folder"] == str(run.folder)
    else:
        assert "trials.parquet" in shown
        assert "日本語-\\U0001f600" in shown if encoding == "cp932" else "\\u65e5" in shown


def test_a_phase_is_a_line_in_a_pipe_and_nothing_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with Screen(quiet=quiet).phase("reading the datasets"):
            pass
    assert capsys.readouterr().out == "reading the datasets\n"


# Reported in TweetWallFX/TweetwallFX#85
def test_entering_a_context_is_a_phase_and_leaves_it_in_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    left: list[str] = []

    @contextlib.contextmanager
    def slow() -> Iterator[str]:
        yield "here"
        left.append("there")

    with Screen().entering("starting Ray", slow()) as where:
        assert (where, left) == ("here", [])
    assert left == ["there"]
    assert capsys.readouterr().out == "starting Ray\n"


def command(screen: Screen, run: Any) -> None:
    """A command like the main job: it shows its progress, a library prints, and it concludes."""
    with screen.kept_clean():
        with Progress(RunConfig.from_preset("quick", name="r"), {}, console=screen) as progress:
            for row in run.trials:
                progress.on_trial_end(row["trial"], row)
        print("a library's line")
        final_report(run.summary, run.trials, run.stage2, screen, folder=run.folder)
        screen.conclude({**run.summary, "nan": float("nan")}, result_lines(run.summary, run.stage2, run.folder))


def test_json_is_the_only_thing_on_stdout(make_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    command(Screen(as_json=True), run)
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["winner"]["trial"] == 0
    assert found["nan"] is None  # JSON has no NaN
    assert "a library's line" in err
    assert len(re.findall(r"^trial \d+: \w+ after", err, re.MULTILINE)) == len(run.trials)
    assert run.summary["verdict_sentence"] in " ".join(err.split())


def test_quiet_prints_what_must_be_known_the_verdict_and_the_paths(
    make_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(source="synthetic suite")
    command(Screen(quiet=True), run)
    out, err = capsys.readouterr()
    notice, gate, library, verdict, *paths = [*out.splitlines()[1:3], out.splitlines()[0], *out.splitlines()[3:]]
    assert library == "a library's line"  # only a document needs stdout to itself
    assert notice.startswith("! SYNTHETIC DATA")
    assert gate.startswith("! gate 0.42")
    assert verdict == run.summary["verdict_sentence"]
    assert paths == [f"tables: {run.folder / 'trials.parquet'}"]
    assert err == ""


def test_both_leave_the_document_alone(make_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    command(Screen(quiet=True, as_json=True), make_run(gate=1.0))
    out, err = capsys.readouterr()
    assert json.loads(out)["exit_code"] == 3
    assert err == "a library's line\n"


def test_neither_concludes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().conclude({"a": 1}, ["line"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        ({"survivors": [], "weights_kept": [5, 2]}, ["nkat", "evaluate", "--best", "2"]),
        ({"survivors": [], "weights_kept": []}, []),
        ({"survivors": []}, []),  # of a version that kept none
        ({"survivors": [5], "weights_kept": [5]}, []),
    ],
)
def test_a_run_without_survivors_names_the_command_that_evaluates_its_best_trials(
    summary: dict[str, Any], said: list[str], tmp_path: Path
) -> None:
    words = shlex.split(after_the_fact(summary, tmp_path / "a run"))
    assert words == ([*said[:2], str(tmp_path / "a run"), *said[2:]] if said else [])


def test_the_report_of_such_a_run_prints_it_whole(make_run: Callable[..., Any]) -> None:
    run = make_run(gate=1.0)
    summary = {**run.summary, "weights_kept": [7]}
    console = Console(file=io.StringIO(), width=40)
    final_report(summary, run.trials, [], console, folder=run.folder)
    assert f"nkat evaluate {run.folder} --best 1\n" in console.file.getvalue()  # type: ignore[attr-defined]
