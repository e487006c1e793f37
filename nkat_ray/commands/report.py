"""`nkat report`: the report of a run again, also of one that is still going; or several runs side by side."""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from nkat_ray.report import tables
from nkat_ray.report.html import compare, write_report
from nkat_ray.report.terminal import final_report
from nkat_ray.search.journal import read_state
from nkat_ray.search.rows import trial_rows
from nkat_ray.search.storage import CONFIG_FILE


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write report.html of a run, or one page that compares several."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path | None = None
    """File to write. Default: report.html in the run's folder, or comparison.html here."""


def report(config: ReportConfig, console: Console) -> int:
    """Write the page and print the report of a single run.

    Raises:
        ValueError: no folder was given, or one that holds no run.
    """
    if not config.runs:
        raise ValueError("no run was given; name its folder, e.g. `nkat report runs/quick-20260101-120000`")
    for folder in config.runs:
        if not (folder / CONFIG_FILE).exists():
            raise ValueError(f"run is {str(folder)!r}; that folder holds no run ({CONFIG_FILE} is missing)")
    if len(config.runs) > 1:
        page = compare(*config.runs, out=config.out or Path("comparison.html"))
    else:
        _print(config.runs[0], console)
        page = write_report(config.runs[0], config.out)
    console.print(f"report: {page}", markup=False, soft_wrap=True)
    return 0


def _print(folder: Path, console: Console) -> None:
    """The terminal's report; of a run that is still going from its journal, without touching its files."""
    from nkat_ray.outputs import print_report, stage2_rows, summarise
    from nkat_ray.prepare import config_of_json

    if (folder / tables.SUMMARY_FILE).exists():
        print_report(folder, console)
        return
    saved = json.loads((folder / CONFIG_FILE).read_text())
    run, state = config_of_json(saved), read_state(folder)
    if not state.trials:
        console.print("the run has only begun: there is nothing to report yet")
        return
    summary = summarise(run, state, saved["found"], None)
    final_report(summary, trial_rows(state, run), stage2_rows(state), console, folder=folder)
