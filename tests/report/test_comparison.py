"""Several runs on one page."""

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.report.comparison import compare


def test_compare_names_both_runs_and_what_differs(make_run: Callable[..., Any], tmp_path: Path) -> None:
    runs = [make_run("one"), make_run("two", gate=0.46), make_run("none", gate=1.0)]
    path = compare(*(run.folder for run in runs), out=tmp_path / "compare.html")
    page = html.unescape(path.read_text(encoding="utf-8"))
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings == ["Against the targets", "Datasets", "The search", "Winners' configurations"]
    assert all(f"<td>{name}</td>" in page for name in ("one", "two", "none"))
    assert "one has the highest Global TPE on validation (0.619)" in page


def test_a_single_run_is_compared_with_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two runs"):
        compare(tmp_path, out=tmp_path / "x.html")
