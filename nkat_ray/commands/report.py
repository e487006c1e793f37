"""`nkat report`: the report of a run again, also of one that is still going; or several runs side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from nkat_ray.config import ScreenConfig
from nkat_ray.files import CONFIG_FILE, STAGE2_FILE, SUMMARY_FILE, TRIALS_FILE
from nkat_ray.report import tables
from nkat_ray.report.comparison import compare
from nkat_ray.report.html import write_report
from nkat_ray.report.terminal import Screen, final_report, result_lines
from nkat_ray.search.journal import read_state
from nkat_ray.search.rows import trial_rows


@dataclass(frozen=True, kw_only=True)
class ReportConfig(ScreenConfig):
    """Write report.html of a run, or one page that compares several."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path | None = None
    """File to write. Default: report.html in the run's folder, or comparison.html here."""


def report(config: ReportConfig, screen: Screen) -> int:
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
        document: dict[str, Any] = {"runs": [folder.absolute() for folder in config.runs]}
        lines: list[str] = []
    else:
        document, lines = _print(config.runs[0], screen)
        page = write_report(config.runs[0], config.out)
    screen.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
    screen.conclude({**document, "report": page.absolute()}, [*lines, f"report: {page}"])
    return 0


def _print(folder: Path, screen: Screen) -> tuple[dict[str, Any], list[str]]:
    """The terminal's report; of a run that is still going from its journal, without touching its files.

    Returns:
        The same for scripts: summary.json's keys with the folder, and the lines of --quiet.
    """
    from nkat_ray.outputs import stage2_rows, summarise
    from nkat_ray.prepare import config_of_json

    if (folder / SUMMARY_FILE).exists():
        summary = tables.read_summary(folder / SUMMARY_FILE, *tables.SUMMARY_KEYS)
        for file in (TRIALS_FILE, STAGE2_FILE):
            if not (folder / file).is_file():
                raise ValueError(f"run is {str(folder)!r}; its {file} is missing; copy the folder again")
        trials, stage2 = (
            tables.read_trials(folder / TRIALS_FILE),
            tables.read_stage2(folder / STAGE2_FILE),
        )
    else:
        saved = tables.read_summary(folder / CONFIG_FILE, "found")
        run, state = config_of_json(saved), read_state(folder)
        if not state.trials:
            text = "the run has only begun: there is nothing to report yet"
            screen.print(text)
            return {"folder": folder.absolute(), "exit_code": None}, [text]
        summary = summarise(run, state, saved["found"], None)
        trials, stage2 = trial_rows(state, run), stage2_rows(state)
    final_report(summary, trials, stage2, screen, folder=folder)
    return {**summary, "folder": folder.absolute()}, result_lines(summary, stage2)
