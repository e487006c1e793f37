"""A page's figures: what comes from data is text, whatever it holds."""

import json
from pathlib import Path

import plotly.graph_objects as go

from nkat_ray.report.charts import figure
from nkat_ray.report.page import Page, templates

HOSTILE = "</script><a href=x><b>bold</b>"


def test_strings_of_a_figure_are_no_markup_to_plotly_and_hover_templates_are() -> None:
    trace = go.Scatter(x=[HOSTILE], y=[1], name=HOSTILE, meta=[HOSTILE], text=HOSTILE, hovertemplate="<b>%{x}</b>")
    made = figure([trace], x=HOSTILE, annotations=[{"x": 0, "y": 1, "text": HOSTILE}])
    page = Page("comparison.html", {"datasets": made, "search": made}, _content()).render()
    drawn = json.loads(page.split('id="figures">')[1].split("</script>")[0])["search"]
    assert json.dumps(drawn).count("&lt;b&gt;") == 6
    assert drawn["data"][0]["hovertemplate"] == "<b>%{x}</b>"
    assert drawn["data"][0]["x"] == ["&lt;/script&gt;&lt;a href=x&gt;&lt;b&gt;bold&lt;/b&gt;"]


def test_values_that_are_not_finite_become_null() -> None:
    made = figure([go.Scatter(x=[1, 2], y=[float("nan"), float("inf")])])
    page = Page("comparison.html", {"datasets": made, "search": made}, _content()).render()
    assert '"y": [null, null]' in page


def test_a_page_is_written_whole_and_escapes_its_content(tmp_path: Path) -> None:
    empty = figure([])
    content = {**_content(), "headline": HOSTILE, "title": HOSTILE}
    out = Page("comparison.html", {"datasets": empty, "search": empty}, content).save(tmp_path / "page.html")
    assert HOSTILE not in out.read_text(encoding="utf-8").split("<script>")[0]
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_every_template_escapes() -> None:
    made = templates()
    assert made.autoescape is True
    assert made.loader is not None
    assert "| safe" not in "".join(made.loader.get_source(made, name)[0] for name in made.list_templates())


def _content() -> dict[str, object]:
    names = ("runs", "notices", "cards", "counted", "ends", "epochs", "differences")
    return {**{name: {} for name in names}, "title": "", "headline": "", "reasons": ()}
