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

from nkat_ray.cli import parse
from nkat_ray.config import TrainConfig, TrialConfig
from nkat_ray.files import CONFIG_FILE, CURVES_FILE, STAGE2_FILE, SUMMARY_FILE, TRIALS_FILE
from nkat_ray.report import tables
from nkat_ray.report.html import funnel, train_command, write_report
from nkat_ray.report.run_folder import load_run

SECTIONS = [
    "Against the targets", "From proposals to a winner", "Learning curves", "Datasets", "What mattered",
    "Accuracy against lambda", "Where the time went", "The winner, to train again", "Data, versions, seeds",
]  # fmt: skip


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
        if tag not in ("meta", "link"):
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


def test_sections_come_in_order(make_run: Callable[..., Any]) -> None:
    run = make_run(journal=True)
    path = write_report(run.folder)
    assert path == run.folder / "report.html"
    page = outline(path)
    assert page.headings == SECTIONS
    assert page.said.index(run.summary["verdict_sentence"]) < page.said.index(SECTIONS[0])
    assert "gate 0.42 (preset laptop; the notes' gate is 0.60)" in page.said


def test_one_file_that_names_no_other(make_run: Callable[..., Any]) -> None:
    run = make_run(repeat=7, epochs=40, journal=True)
    assert len(run.trials) > 50
    path = write_report(run.folder)
    assert path.stat().st_size < 6_000_000
    page = outline(path)
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert not (attributes.get("href") or "data:").startswith(("http", "/", ".")), attributes
    assert [file.name for file in path.parent.glob(".*")] == []


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "</script><script>alert(2)//", '"><img src=x>'])
def test_everything_from_data_is_escaped(make_run: Callable[..., Any], hostile: str) -> None:
    run = make_run()
    rows = tables.read_trials(run.folder / TRIALS_FILE)
    for row in rows:
        row |= {
            "error": hostile,
            "node": hostile,
            "config/conv_stem": hostile,
            "trial_id": hostile,
            "stop_detail": hostile,
        }
    tables.write_trials(run.folder / TRIALS_FILE, rows)
    stage2 = tables.read_stage2(run.folder / STAGE2_FILE)
    tables.write_stage2(run.folder / STAGE2_FILE, [row | {"error": hostile, "mode": hostile} for row in stage2])
    summary = run.summary | {
        "versions": {hostile: hostile}, "lambda_model": hostile, "preset": hostile,
        "data": {hostile: {"source": hostile}},
    }  # fmt: skip
    tables.write_summary(run.folder / SUMMARY_FILE, summary)
    config = json.loads((run.folder / CONFIG_FILE).read_text()) | {"name": hostile, "space": hostile}
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
    for file in (CURVES_FILE, TRIALS_FILE):
        (run.folder / file).unlink()
        assert "No trial" in outline(write_report(run.folder)).said or file == CURVES_FILE


def test_without_survivors_the_report_says_which_accuracy_was_missing(make_run: Callable[..., Any]) -> None:
    page = outline(write_report(make_run(gate=0.60).folder))
    assert "Not reached: no trial passed the gate" in page.said
    assert "trial 5 with an accuracy of 0.685" in page.said
    assert "the gate of 0.60 asks for 0.868" in page.said
    assert "The winner, to train again" not in page.headings


def test_nothing_is_met_with_three_datasets(make_run: Callable[..., Any]) -> None:
    page = outline(write_report(make_run(emnist=None).folder))
    assert "Undecided: trial 0 counts on only 3 of 4 datasets" in page.said
    assert ("span", {"class": "good"}) not in page.tags


def test_funnel_counts_every_trial_and_epoch_once(make_run: Callable[..., Any]) -> None:
    run = make_run()
    steps = funnel(run.trials, 0)
    assert [(step.name, step.left) for step in steps] == [
        ("proposed", 8), ("no fault", 6), ("past smoke", 5), ("past ASHA", 4), ("survivors of the gate", 3),
        ("winner", 1),
    ]  # fmt: skip
    spent = [int(n) for step in steps[1:-1] for n in re.findall(r"(\d+) epochs", step.said)]
    assert sum(spent) == sum(row["epochs"] for row in run.trials) == 62


@pytest.mark.parametrize(
    "config",
    [
        TrialConfig(),
        TrialConfig(conv_stem="small", embed_dim=512, depth=9, temperature=0.8123456789, top_p=0.91, split_heads=True),
        TrialConfig(top_k=None, top_p=None, randaugment=None, cutout=None, clip_grad=None, ema=None, train_images=4000),
        TrialConfig(randaugment=(3, 12), stem_stride=2, color_norm="residual", lr=1.7e-4),
    ],
)
def test_train_command_gives_the_configuration_back(config: TrialConfig) -> None:
    command = train_command(vars(config), seed=17, data_dir="/data/it's here")
    words = shlex.split(command)
    assert words[:2] == ["nkat", "train"]
    parsed = parse(TrainConfig, words[2:], prog="nkat train")  # the command line's own parser
    assert {name: getattr(parsed, name) for name in vars(config)} == vars(config)
    assert parsed.seed == 17
    assert parsed.data_dir == Path("/data/it's here")


@pytest.mark.parametrize("source", ["torchvision's layout in /data", "synthetic suite 1"])
def test_the_command_on_the_page_trains_the_winner(make_run: Callable[..., Any], source: str) -> None:
    run = make_run(source=source)
    page = write_report(run.folder).read_text(encoding="utf-8")
    found = re.search(r'<pre id="command">(.*?)</pre>', page, re.DOTALL)
    assert found
    words = shlex.split(html.unescape(found[1]))
    assert words[:2] == ["nkat", "train"]
    parsed = parse(TrainConfig, words[2:], prog="nkat train")
    winner = tables.config_of(run.trials[run.summary["winner"]["trial"]])
    assert {name: getattr(parsed, name) for name in winner} == winner
    assert parsed.seed == run.trials[run.summary["winner"]["trial"]]["seed"]
    assert parsed.data == ("synthetic" if source.startswith("synthetic") else "auto")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path / "nowhere")
