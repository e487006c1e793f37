"""A page: one HTML file from a template that contains its styles, script, figures and plotly, so it needs no network.

The templates escape every value. Figures are kept as JSON in the page and drawn by its script, which colours them for
dark, light and print. The page's own policy forbids every request.
"""

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup

from nkat_ray.files import write_atomically
from nkat_ray.metrics import STAGE2_DATASETS
from nkat_ray.record import scoring
from nkat_ray.report.charts import reason
from nkat_ray.report.demand import spoken_accuracy, spoken_span
from nkat_ray.report.language import Code, Language, language
from nkat_ray.report.wording import spoken_time

MARKUP: Final = ("hovertemplate",)  # keys of a figure whose strings are markup; all others are data
SHOWN: Final = ("text", "name", "label", "x", "y", "customdata", "meta", "ticktext", "categoryarray")  # not options


@cache
def templates(lang: Code = "en") -> jinja2.Environment:
    """Return the pages' templates in a language."""
    shown_in = language(lang)
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("nkat_ray.report"),
        extensions=["jinja2.ext.i18n"],
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.install_gettext_callables(shown_in.of, lambda one, many, n: shown_in.of(one), newstyle=True)  # type: ignore[attr-defined]
    made.filters |= {
        "number": scoring.number,
        "duration": scoring.duration,
        "setting": scoring.setting,
        "dataset": scoring.dataset_name,
        "stage2_status": scoring.stage2_status,
        "reason": reason,
        "needed": spoken_accuracy,
        "span": spoken_span,
        "spoken_time": spoken_time,
        "tr": shown_in.of,
    }
    made.globals |= {
        "language": shown_in,
        "metric_names": scoring.METRIC_NAMES,
        "targets_of": scoring.dataset_targets,
        "notes_datasets": STAGE2_DATASETS,
    }
    return made


@dataclass(frozen=True)
class Page:
    """A template, its figures by name, the values of its variables, and the language that all are shown in."""

    template: str
    figures: Mapping[str, go.Figure]
    content: Mapping[str, Any] = field(default_factory=dict)
    lang: Code = "en"

    def render(self) -> str:
        """Return the whole file."""
        from plotly.offline import get_plotlyjs  # slow to load, and only a page that is written needs it

        drawn = {
            name: _as_text(json.loads(figure.to_json()), language(self.lang)) for name, figure in self.figures.items()
        }
        figures = json.dumps(drawn, allow_nan=False).replace("<", "\\u003c")
        return (
            templates(self.lang)
            .get_template(self.template)
            .render(self.content, figures=self.figures, figures_json=Markup(figures), plotly=Markup(get_plotlyjs()))
        )

    def save(self, out: Path) -> Path:
        """Write the file, whole or not at all, and return its path."""
        write_atomically(out, self.render().encode())
        return out


def _as_text(value: Any, shown_in: Language, key: str = "") -> Any:
    """Translate and escape the strings of a part of a figure, since plotly renders a subset of HTML."""
    if isinstance(value, dict):
        return {name: _as_text(item, shown_in, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_as_text(item, shown_in, key) for item in value]
    if not isinstance(value, str):
        return value
    if key in MARKUP:
        return shown_in.of_lines(value)
    return html.escape(shown_in.of(value) if key in SHOWN else value, quote=False)
