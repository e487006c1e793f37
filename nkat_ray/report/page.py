"""The frame of a report page: one HTML file with its styles, its script, plotly and its figures inside; no network.

Figures are kept as JSON in the page and drawn by the script, which colours them for dark, light and print. The page's
own policy forbids every request.
"""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from nkat_ray.files import write_atomically
from nkat_ray.report import tables

POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
    "form-action 'none'"
)
FIGURE_HEIGHT_PX: Final = 440
VERDICT_CLASS: Final = {"reached": "good", "not reached": "bad", "undecided": "open"}

STYLE: Final = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de;
  --good: #006b4f; --bad: #b03a00; --open: #7a5300; --bar: #0072b2; --grid: #e3e7ec; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1d2127; --ink: #e6e9ed; --soft: #a3acb7;
  --line: #39414b; --good: #4fd1a5; --bad: #ff9a66; --open: #f0c45c; --bar: #56b4e9; --grid: #2c333b; } }
@media print { section > * { break-inside: avoid; } h2, h3 { break-after: avoid; }
  button, details > summary, details:not(.printed) { display: none; } .scroll { overflow: visible; }
  table, th, .aside { font-size: 0.62rem !important; } th, td { padding: 3px 6px 3px 0; }
  td:last-child { min-width: 0 !important; overflow-wrap: anywhere; }
  .funnel .bar { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
:root.print { color-scheme: light; --paper: #ffffff; --card: #ffffff; --ink: #000000; --soft: #333333; --line: #999999;
  --good: #006b4f; --bad: #b03a00; --open: #7a5300; --bar: #0072b2; --grid: #dddddd; }
:root.print main { width: 700px; padding: 0; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK JP", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.15rem; font-weight: 600; margin: 0; color: var(--soft); overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 8px; }
h3 { font-size: 1rem; margin: 16px 0 4px; }
p { margin: 6px 0; max-width: 75ch; }
.verdict { font-size: 1.5rem; line-height: 1.3; font-weight: 650; margin: 8px 0 16px; max-width: none; }
.good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--open); }
.notice { border-left: 4px solid var(--open); background: var(--card); padding: 8px 12px; margin: 8px 0;
  font-weight: 600; }
.soft { color: var(--soft); font-size: 0.92rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 8px 0; }
th, td { padding: 5px 14px 5px 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: 0.92rem; }
td.n, th.n { text-align: right; }
td.n, td:first-child { white-space: nowrap; }
td:last-child:not(.n) { min-width: 10ch; }
.aside { color: var(--soft); font-size: 0.92rem; }
.chart { width: 100%; }
.pair, .many { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.many { grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); }
.pair > *, .many > * { min-width: 0; }
.funnel { display: grid; grid-template-columns: max-content 1fr; gap: 6px 14px; align-items: center; }
.funnel .bar { background: var(--bar); height: 26px; border-radius: 3px; min-width: 2px; }
.funnel .what { font-weight: 600; }
.funnel .said { font-size: 0.92rem; color: var(--soft); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 12px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 0.9rem/1.5 ui-monospace, "DejaVu Sans Mono", Consolas, monospace; margin: 8px 0; }
button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 4px 12px; cursor: pointer; }
summary { cursor: pointer; color: var(--soft); }
@media (max-width: 560px) { main { padding: 16px 12px 48px; } .verdict { font-size: 1.25rem; }
  .funnel { grid-template-columns: 1fr; gap: 2px; } .funnel .bar { height: 18px; } th, td { padding-right: 10px; }
  table { font-size: 0.92rem; } .aside { display: block; } .minor { display: none; }
  .many { grid-template-columns: 1fr 1fr; gap: 4px; } }
"""

SCRIPT: Final = """
const figures = JSON.parse(document.getElementById('figures').textContent);
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = window.matchMedia('(prefers-color-scheme: dark)');
const clone = value => JSON.parse(JSON.stringify(value));
function inked(value, ink) {
  if (value === 'ink') return ink;
  if (Array.isArray(value)) return value.map(item => inked(item, ink));
  if (value && typeof value === 'object')
    for (const key of Object.keys(value)) value[key] = inked(value[key], ink);
  return value;
}
function themed(figure, width) {
  const printing = document.documentElement.classList.contains('print');
  const narrow = document.querySelector('main').clientWidth < 560;
  const data = inked(clone(figure.data), css('--ink')), layout = clone(figure.layout);
  layout.paper_bgcolor = layout.plot_bgcolor = 'rgba(0,0,0,0)';
  layout.font = {...layout.font, color: css('--ink'), size: narrow ? 11 : 13};
  layout.hoverlabel = {bgcolor: css('--card'), bordercolor: css('--line'), font: {color: css('--ink')}, align: 'left'};
  for (const axis of ['xaxis', 'yaxis'])
    Object.assign(layout[axis], {gridcolor: css('--grid'), linecolor: css('--line'), tickcolor: css('--line')});
  if (narrow) layout.margin.l = 8;
  if (printing) layout.width = width;  // there is no time to wait for a resize
  return [data, layout];
}
function draw() {
  for (const [id, figure] of Object.entries(figures)) {
    const [data, layout] = themed(figure, document.getElementById(id).clientWidth);
    Plotly.react(id, data, layout, {responsive: true, displaylogo: false, displayModeBar: false, showTips: false});
  }
}
draw();
dark.addEventListener('change', draw);
let opened = [];
window.addEventListener('beforeprint', () => {  // the print style is not in force yet: a class brings it now
  document.documentElement.classList.add('print');
  opened = [...document.querySelectorAll('details.printed:not([open])')];
  opened.forEach(item => item.open = true);
  draw();
});
window.addEventListener('afterprint', () => {
  document.documentElement.classList.remove('print');
  opened.forEach(item => item.open = false);
  draw();
});
for (const button of document.querySelectorAll('button[data-copy]'))
  button.addEventListener('click', async () => {
    const source = document.getElementById(button.dataset.copy);
    try { await navigator.clipboard.writeText(source.textContent); button.textContent = 'Copied'; }
    catch { getSelection().selectAllChildren(source); button.textContent = 'Selected: press Ctrl-C'; }
  });
"""


class Page:
    """Collects sections and figures, and renders them as one file."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = []
        self._figures: dict[str, dict[str, Any]] = {}

    def add(self, markup: str) -> None:
        """Add markup whose text is escaped already."""
        self._parts.append(markup)

    def section(self, title: str, *parts: str) -> None:
        """Add a section with a heading; parts that are empty are left out, and so is a section without any."""
        body = "\n".join(part for part in parts if part)
        if body:
            self.add(f"<section><h2>{escaped(title)}</h2>\n{body}\n</section>")

    def chart(self, figure: dict[str, Any], label: str) -> str:
        """Keep a figure (plotly's data and layout, optionally a height in pixels) and return its place in the page."""
        name = f"chart-{len(self._figures) + 1}"
        height = figure.get("height", FIGURE_HEIGHT_PX)
        layout = {**figure["layout"], "height": height}
        self._figures[name] = {"data": figure["data"], "layout": layout}
        style = f"min-height:{height}px"
        return f'<div class="chart" id="{name}" role="img" aria-label="{escaped(label)}" style="{style}"></div>'

    def render(self) -> str:
        """The whole file."""
        from plotly.offline import get_plotlyjs  # slow to load, and only pages need it

        figures = json.dumps(tables.plain(self._figures), allow_nan=False).replace("<", "\\u003c")
        return "\n".join(
            [
                '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f'<title>{escaped(self._title)}</title>\n<link rel="icon" href="data:,">',
                f"<style>{STYLE}</style>\n</head>\n<body>\n<main>",
                *self._parts,
                "</main>",
                f'<script type="application/json" id="figures">{figures}</script>',
                f"<script>{get_plotlyjs()}</script>\n<script>{SCRIPT}</script>\n</body>\n</html>\n",
            ]
        )

    def save(self, out: Path) -> Path:
        """Write the file, whole or not at all; returns its path."""
        write_atomically(out, self.render().encode())
        return out


def escaped(value: object) -> str:
    """Any value as text that is safe in markup and attributes."""
    return html.escape(str(value))


def cell(value: Any) -> str:
    """A value of a configuration as a table shows it."""
    return "off" if value is None else f"{value:.4g}" if isinstance(value, float) else escaped(value)


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[int] = (), minor: Sequence[int] = ()
) -> str:
    """A table that scrolls sideways on its own; cells are markup that is escaped already.

    Args:
        header: column titles, plain text.
        rows: cells.
        numeric: indices of columns that are aligned right.
        minor: indices of columns that a phone leaves out.
    """
    kinds = [("n " if n in numeric else "") + ("minor" if n in minor else "") for n in range(len(header))]
    styles = [f' class="{kind.strip()}"' if kind else "" for kind in kinds]

    def line(tag: str, cells: Sequence[str]) -> str:
        return (
            "<tr>"
            + "".join(f"<{tag}{style}>{text}</{tag}>" for style, text in zip(styles, cells, strict=True))
            + "</tr>"
        )

    head = line("th", [escaped(title) for title in header])
    body = "\n".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>'
