"""`nkat report`: what it says for scripts. The page has tests of its own."""

import json
from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("flags", "locale", "wanted"),
    [
        ((), "ja_JP.UTF-8", "ja"),
        ((), "C.UTF-8", "en"),
        (("--lang", "en"), "ja_JP.UTF-8", "en"),
        (("--lang", "ja"), "C.UTF-8", "ja"),
    ],
)
def test_the_page_is_in_the_language_of_the_flag_or_the_locale(
    flags: tuple[str, ...],
    locale: str,
    wanted: str,
    nkat_script: Callable[..., Any],
    make_run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(gate=0.60)
    monkeypatch.setenv("LC_ALL", locale)
    code, _, said = nkat_script("report", run.folder, "--quiet", *flags)
    assert (code, said) == (0, "")
    assert f'<html lang="{wanted}">' in (run.folder / "report.html").read_text(encoding="utf-8")


def test_a_language_that_does_not_exist_is_refused(
    nkat_script: Callable[..., Any], make_run: Callable[..., Any]
) -> None:
    run = make_run()
    code, _, said = nkat_script("report", run.folder, "--lang", "fr")
    assert code == 2
    assert all(word in said for word in ("lang", "auto", "en", "ja"))
    assert said.count("\n") == 1
    assert not (run.folder / "report.html").exists()


def test_the_document_says_what_limits_the_run(nkat_script: Callable[..., Any], make_run: Callable[..., Any]) -> None:
    run = make_run(gate=0.60)
    code, said, _ = nkat_script("report", run.folder, "--json", "--quiet")
    assert code == 0
    limits = json.loads(said)["limits"]
    assert list(limits) == ["demands", "others", "measured", "gap", "losses", "reach", "diagnoses", "steps"]
    assert limits["demands"][0]["conv_stem"] == "off"
    assert limits["gap"].startswith("Trial 5 is closest to the gate")
    assert limits["diagnoses"][0]["trial"] == 5
    assert limits["steps"][0]["command"].startswith("nkat train")
