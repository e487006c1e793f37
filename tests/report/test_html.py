"""report.html from a run's files alone: whole, running, without survivors; one safe file."""

import html
import json
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.commands.train import read as read_training
from nkat_ray.files import CONFIG_FILE, STAGE2_FILE, SUMMARY_FILE, TRIALS_FILE
from nkat_ray.record import tables
from nkat_ray.record.run_folder import load_run
from nkat_ray.report.html import funnel, trial_views, write_report


class Outline(HTMLParser):
    """Headings, tags and text outside scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said = ""
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] not in ("script", "style"):
            self.said += data
        if self._inside and self._inside[-1] == "h2":
            self.headings.append(data)


def outline(path: Path) -> Outline:
    return Outline(path.read_text(encoding="utf-8"))


def test_the_verdict_comes_first_then_what_limits_it_then_what_to_do(make_run: Callable[..., Any]) -> None:
    run = make_run(repeat=4)
    path = write_report(run.folder)
    assert path == run.folder / "report.html"
    page = outline(path)
    assert page.headings[:4] == ["What limits it", "What to do next", "Against the targets", "Datasets"]
    assert page.said.index(run.summary["verdict_sentence"]) < page.said.index("What limits it")
    assert "gate 0.42 (preset laptop; the notes' gate is 0.60)" in page.said
    links = [dict(attributes)["href"] for tag, attributes in page.tags if tag == "a"]
    sections = [dict(attributes)["id"] for tag, attributes in page.tags if tag == "section"]
    assert links == [f"#{section}" for section in sections]
    assert len(sections) == len(page.headings)


def test_verdict_survivors_and_ranking_are_those_of_the_summary(make_run: Callable[..., Any]) -> None:
    run = make_run()
    said = {"verdict": "reached", "verdict_sentence": "Reached: as the run itself has worked out.", "ranking": [7, 0]}
    tables.write_summary(run.folder / SUMMARY_FILE, run.summary | said)
    text = write_report(run.folder).read_text(encoding="utf-8")
    assert '<p class="verdict good">Reached: as the run itself has worked out.</p>' in text
    survivors = text[text.index("<h3>Survivors</h3>") :]
    assert [int(trial) for trial in re.findall(r'<tr><td class="n">\d+</td><td class="n">(\d+)</td>', survivors)] == [
        7,
        0,
    ]


def test_one_file_that_names_no_other(make_run: Callable[..., Any]) -> None:
    run = make_run(repeat=7, epochs=40)
    assert len(run.trials) > 50
    path = write_report(run.folder)
    assert path.stat().st_size < 6_000_000
    page = outline(path)
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith(("data:,", "#")), attributes
    assert [file.name for file in path.parent.glob(".*")] == []


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "</script><script>alert(2)//", '"><img src=x>'])
def test_everything_from_data_is_escaped(make_run: Callable[..., Any], hostile: str) -> None:
    run = make_run()
    rows = tables.read_rows(run.folder / TRIALS_FILE)
    for row in rows:
        row |= {
            "error": hostile,
            "node": hostile,
            "config/conv_stem": hostile,
            "trial_id": hostile,
            "stop_detail": hostile,
        }
    tables.write_rows(run.folder / TRIALS_FILE, rows)
    stage2 = tables.read_rows(run.folder / STAGE2_FILE)
    tables.write_rows(run.folder / STAGE2_FILE, [row | {"error": hostile, "mode": hostile} for row in stage2])
    summary = run.summary | {
        "versions": {hostile: hostile}, "lambda_model": hostile, "preset": hostile,
        "data": {hostile: {"source": hostile}},
    }  # fmt: skip
    tables.write_summary(run.folder / SUMMARY_FILE, summary)
    config = json.loads((run.folder / CONFIG_FILE).read_text()) | {
        "name": hostile, "space": hostile, "own_space": {"depth": {"low": 1, "high": 2, "step": 1}},
    }  # fmt: skip
    (run.folder / CONFIG_FILE).write_text(json.dumps(config))
    clean = outline(write_report(make_run("clean").folder))
    page = outline(write_report(run.folder))
    assert len([tag for tag, _ in page.tags if tag == "script"]) == len(
        [tag for tag, _ in clean.tags if tag == "script"]
    )
    assert not any(tag == "img" for tag, _ in page.tags)
    assert hostile in page.said


def test_a_run_still_going_has_a_report(make_run: Callable[..., Any]) -> None:
    run = make_run(running=True)
    page = outline(write_report(run.folder))
    assert "This run has not ended" in page.said
    assert "Undecided" in page.said
    assert "3 of 8 trials passed the gate so far" in page.said


def test_without_survivors_the_report_says_which_accuracy_was_missing(make_run: Callable[..., Any]) -> None:
    page = outline(write_report(make_run(gate=0.60).folder))
    assert "Not reached: no trial passed the gate" in page.said
    assert "Trial 5 is closest to the gate, with an accuracy of 0.685" in page.said
    assert "the gate of 0.60 needs 0.868, 0.183 more" in page.said
    assert "The winner, to train again" not in page.headings


def test_nothing_is_met_with_three_datasets(make_run: Callable[..., Any]) -> None:
    page = outline(write_report(make_run(emnist=None).folder))
    assert "Undecided: trial 0 counts on only 3 of 4 datasets" in page.said
    assert ("span", {"class": "good"}) not in page.tags


def test_funnel_counts_every_trial_and_epoch_once(make_run: Callable[..., Any]) -> None:
    run = make_run()
    steps = funnel(run.trials, 0)
    assert [(step.name, step.left) for step in steps] == [
        ("proposed", 8), ("without a fault", 6), ("past smoke", 5), ("past ASHA", 4), ("survivors of the gate", 3),
        ("winner", 1),
    ]  # fmt: skip
    spent = [int(n) for step in steps[1:-1] for n in re.findall(r"(\d+) epochs", step.said)]
    assert sum(spent) == sum(row["epochs"] for row in run.trials) == 62


def test_funnel_leaves_out_steps_at_which_none_ended(make_run: Callable[..., Any]) -> None:
    rows = [row for row in make_run().trials if row["stop_reason"] in ("finished", "asha")]
    assert [step.name for step in funnel(rows, 0)] == ["proposed", "past ASHA", "survivors of the gate", "winner"]


def test_the_trials_table_has_a_row_a_curve_and_a_command_per_trial(make_run: Callable[..., Any]) -> None:
    run = load_run(make_run(fixed=["depth"]).folder)
    views = trial_views(run)
    assert [view.row["trial"] for view in views] == list(range(8))
    assert [len(view.curve.split()) for view in views] == [12, 12, 3, 3, 10, 12, 0, 9]  # a loss of NaN has no point
    assert views[6].why.startswith("RuntimeError")
    assert views[0].why == "stopped by finished"
    page = outline(write_report(run.folder))
    commands = [attributes["data-copy-text"] for tag, attributes in page.tags if "data-copy-text" in attributes]
    assert commands == [view.command for view in views]
    heads = re.search(r'<table id="trial-table".*?</thead>', (run.folder / "report.html").read_text(), re.DOTALL)
    assert heads
    assert ">depth<" not in heads[0]  # the user fixed it
    assert ">top_p<" in heads[0]


# Reported in EleutherAI/lm-evaluation-harness#1112
def test_results_on_the_users_own_datasets_are_shown(make_run: Callable[..., Any]) -> None:
    run = make_run()
    own = [
        {**row, "dataset": "mine", "status": "failed", "test_accuracy": 0.05}
        for row in run.stage2 if row["dataset"] == "mnist"
    ]  # fmt: skip
    tables.write_rows(run.folder / STAGE2_FILE, [row for row in run.stage2 if row["dataset"] == "cifar10"] + own)
    data = {"cifar10": run.summary["data"]["cifar10"], "mine": {"source": "a folder"}}
    tables.write_summary(run.folder / SUMMARY_FILE, run.summary | {"data": data})
    text = (write_report(run.folder)).read_text(encoding="utf-8")
    shown = re.search(r'<table id="results">.*?</table>', text, re.DOTALL)
    assert shown
    names = re.findall(r"<tr>\n<td>([^<]*?)(?: <span|</td>)", shown[0])
    assert names == ["CIFAR-10", "mine"]
    assert "at chance" in shown[0]
    assert "missing" not in shown[0]
    assert ">failed<" not in shown[0]
    assert "Not asked for: MNIST, Fashion-MNIST, EMNIST letters" in text
    accuracy = json.loads(text.split('id="figures">')[1].split("</script>")[0])["test_accuracy"]
    assert accuracy["data"][0]["y"] == ["mine (at chance)", "CIFAR-10"]


@pytest.mark.parametrize("source", ["torchvision's layout in /data", "synthetic suite 1"])
def test_the_command_on_the_page_trains_the_winner(make_run: Callable[..., Any], source: str) -> None:
    run = make_run(source=source)
    page = write_report(run.folder).read_text(encoding="utf-8")
    found = re.search(r'<pre id="winner-command">(.*?)</pre>', page, re.DOTALL)
    assert found
    words = shlex.split(html.unescape(found[1]))
    assert words[:2] == ["nkat", "train"]
    parsed = read_training(words[2:])
    winner = tables.config_of(run.trials[run.summary["winner"]["trial"]])
    assert {name: getattr(parsed, name) for name in winner} == winner
    assert parsed.seed == run.trials[run.summary["winner"]["trial"]]["seed"]
    assert parsed.data == ("synthetic" if source.startswith("synthetic") else "auto")
