"""What a person sees: 80 columns, plain lines in a pipe, nothing when quiet."""

import io
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from nkat_ray.report.progress import Progress
from nkat_ray.report.terminal import Screen, final_report, result_lines


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
    assert "trial 5 with an accuracy of 0.685" in text
    assert "the gate of 0.60 asks for 0.868: 0.183 was missing" in text


def test_final_report_names_a_missing_dataset_verbatim(make_run: Callable[..., Any]) -> None:
    text = printed(make_run(emnist=None))
    assert "Global TPE (3 of 4)" in text
    assert "EMNIST letters: not found: <script>alert(1)</script>" in text
    assert "Undecided" in text


def command(screen: Screen, run: Any) -> None:
    """A command as run.py is one: it shows its progress, a library prints, and it concludes."""
    with screen.kept_clean():
        shown = {"name": "r", "preset": "quick", "gate": 0.29, "data": "CIFAR-10", "epochs": 12}
        with Progress(**shown, console=screen, quiet=screen.quiet) as progress:
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
