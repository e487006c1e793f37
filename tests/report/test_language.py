"""The Japanese report: what the catalogue says, and that nothing of a page is left in English."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.record import scoring
from nkat_ray.report.html import write_report
from nkat_ray.report.language import SLOT, Code, language, own_language
from nkat_ray.report.page import MARKUP, SHOWN
from nkat_ray.search.stops import at_last_epoch, out_of_time
from nkat_ray.search.user_stops import STOPPED

JAPANESE = language("ja")
KEPT = re.compile(  # names, values, flags and words that the Japanese pages keep
    r"\b(NKAT(-Ray)?|TPE|Local|Global|Consistency|Robustness|CIFAR|MNIST|Fashion|EMNIST|letters|lambda|Optuna|Stage|"
    r"Round|Ray|ASHA|asha|CSV|Muon|tiny|small|stem|smoke|gate|nan|error|budget|user|finished|running|laptop|quick|ok|"
    r"notes|counted|millions|top_[kp]|nkat|stop|config|Theory|Practical|Equilibrium|UTC|theory|log10|n|p|x|s)\b"
)

MADE_UP = (  # first words of what the fixture invents: sources and errors stay as they are
    "stopped by ", "RuntimeError: ", "torchvision's layout in", "as it is", "ファインチューニング; not found",
)  # fmt: skip


class Shown(HTMLParser):
    """Text and tooltips of a page, outside of scripts, styles, code and pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.lang: str | None = None
        self.texts: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.lang = self.lang or found.get("lang")
        self.texts += [
            found[name] or "" for name in ("aria-label", "placeholder", "title", "data-tip") if name in found
        ]
        if tag not in ("meta", "link", "input"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not {"script", "style", "pre", "code", "title"} & set(self._inside) and data.strip():
            self.texts.append(data.strip())


@pytest.mark.parametrize("part", ["exact", "sentences"])
def test_a_translation_has_the_slots_of_its_sentence(part: str) -> None:
    entries = JAPANESE.exact.items() if part == "exact" else [(p.pattern, t) for p, t in JAPANESE.patterns]
    for text, translation in entries:
        if part == "exact":
            wanted, found = re.findall(r"%\(\w+\)s", text), re.findall(r"%\(\w+\)s", translation)
            assert sorted(found) == sorted(wanted), text
        else:
            wanted = re.findall(r"\(\?P<(\w+)>", text)
            assert {name for name, _ in SLOT.findall(translation)} == set(wanted), text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("What limits it", "何が制約になっているか"),
        ("Trial 3 came closest. Train it for twice as many epochs, to see whether it passes:",
         "トライアル 3 が最も近づきました。通過するかを見るために 2 倍のエポック数で学習させる："),
        ("0.071 by errors on CIFAR-10, 0.003 by errors on MNIST", "CIFAR-10 の誤りで 0.071、MNIST の誤りで 0.003"),
        ("impossible", "不可能"),
        ("0.822 to impossible", "0.822～不可能"),
        ("epoch 4: Local TPE 0.4190 >= gate 0.38", "エポック 4：Local TPE 0.4190 ≧ ゲート 0.38"),
        ("12 min", "12 分"),
        ("3 of my own words to say", "3 of my own words to say"),
        ("CUDA error: no stem, width of nothing", "CUDA error: no stem, width of nothing"),
        ("", ""),
    ],
)  # fmt: skip
def test_what_has_an_entry_is_translated_and_nothing_else_is_touched(text: str, wanted: str) -> None:
    assert JAPANESE.of(text) == wanted
    assert language("en").of(text) == text


@pytest.mark.parametrize(
    "options",
    [
        {"repeat": 4},
        {"gate": 0.60},
        {"emnist": None},
        {"gate": 0.9},
    ],
    ids=["winner", "another gate", "missing dataset", "none passed"],
)
def test_a_page_has_no_english_sentence_left(
    options: dict[str, Any], make_run: Callable[..., Any], tmp_path: Path
) -> None:
    text = write_report(make_run(**options).folder, tmp_path / "ja.html", lang="ja").read_text(encoding="utf-8")
    page = Shown(text)
    assert page.lang == "ja"
    said = [one for one in page.texts if not one.startswith(MADE_UP)]
    english = {one for one in said if re.search(r"[A-Za-z]{2,} [a-z]{2,}", KEPT.sub("", one))}
    assert english == set()
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert figures["curves"]["layout"]["xaxis"]["title"]["text"] == "エポック"


def test_only_what_is_shown_differs_in_a_figure(make_run: Callable[..., Any], tmp_path: Path) -> None:
    """Plotly's own words, such as `start` of an anchor, are in the catalogue too."""

    def options(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: options(item) for name, item in value.items() if name not in (*SHOWN, *MARKUP)}
        return [options(item) for item in value] if isinstance(value, list) else value

    folder, found = make_run(repeat=4).folder, []
    codes: tuple[Code, ...] = ("en", "ja")
    for code in codes:
        text = write_report(folder, tmp_path / "page.html", lang=code).read_text(encoding="utf-8")
        found.append(json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1]))  # type: ignore[index]
    assert options(found[0]) == options(found[1])
    assert found[0] != found[1]


@pytest.mark.parametrize(
    "said",
    [
        at_last_epoch(4, 0.41, 0.38).detail,
        at_last_epoch(4, 0.31, 0.38).detail,
        out_of_time(3).detail,
        "epoch 4: Local TPE 0.3043 < gate 0.38, accuracy 0.4143 misses 0.5175 by 0.1032",
        "epoch 2: Local TPE 0.3004 is not among the rung's best",
        "epoch 10: accuracy 0.4012 does not exceed 0.45",
        "epoch 3: 8 trials have passed the gate, which is enough (max_survivors); the best has 0.6123",
        "epoch 3: val_accuracy nan, local_tpe None: missing or not finite",
        STOPPED.detail,
        *scoring.notices({"gate": 0.38, "preset": "quick", "data": {"mnist": {"source": "synthetic"}, "cifar10": {}}}),
        "this run was extended from 6 to 12 trials; test scores of its survivors were known by then",
        "evaluated after the fact with its best trial; the run's gate was 0.60; left out without weights: trials 1, 2",
        "With the design of trial 4 (tiny stem, width 64) Global TPE 0.70 is impossible: CIFAR-10 would need 1.124. "
        "No design of this space can reach it.",
        "The design of trial 1 (no stem, width 256) reaches Global TPE 0.70: CIFAR-10 needs 0.840 and has 0.866. "
        "Least is needed with tiny stem, width 64 or 96: 0.822.",
    ],
)  # fmt: skip
def test_what_a_run_stores_is_translated_whole(said: str) -> None:
    kept = KEPT.sub("", JAPANESE.of(said).replace("val_accuracy", "").replace("local_tpe", ""))
    assert not re.search(r"[A-Za-z]{3,}", kept.replace("rung", "").replace("max_survivors", "").replace("None", ""))


def test_the_same_run_has_the_same_sections_in_both_languages(make_run: Callable[..., Any], tmp_path: Path) -> None:
    folder = make_run(repeat=4).folder
    codes: tuple[Code, ...] = ("en", "ja")
    pages = [write_report(folder, tmp_path / f"{one}.html", lang=one).read_text(encoding="utf-8") for one in codes]
    one, other = (re.findall(r'<section id="([^"]+)"', page) for page in pages)
    assert one == other != []


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"LANG": "ja_JP.UTF-8"}, "ja"),
        ({"LANG": "ja"}, "ja"),
        ({"LC_ALL": "C", "LANG": "ja_JP.UTF-8"}, "en"),
        ({"LC_MESSAGES": "ja_JP.eucJP", "LANG": "en_US.UTF-8"}, "ja"),
        ({"LANG": "jam_JM"}, "en"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
    ],
)
def test_the_language_is_the_locales(environment: dict[str, str], wanted: str) -> None:
    assert own_language(environment) == wanted


@pytest.mark.parametrize(("name", "wanted"), [("Japanese_Japan", "ja"), ("ja_JP", "ja"), ("en_US", "en"), (None, "en")])
def test_where_no_variable_is_set_the_system_says_it(
    name: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("locale.getlocale", lambda: (name, "cp932"))
    assert own_language({}) == wanted
