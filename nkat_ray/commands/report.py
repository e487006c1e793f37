"""`nkat report`: write the report of a run again, also of one in progress, or compare several runs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from nkat_ray.config import ScreenConfig
from nkat_ray.errors import UserError
from nkat_ray.fields import Positional
from nkat_ray.files import REPORT_FILE
from nkat_ray.flags import Program
from nkat_ray.record.run_folder import load_run
from nkat_ray.report.advice import limits_of
from nkat_ray.report.comparison import compare_page
from nkat_ray.report.html import run_page
from nkat_ray.report.language import Code, own_language
from nkat_ray.report.terminal import Screen, final_report, result_lines, screen_of


@dataclass(frozen=True, kw_only=True)
class ReportConfig(ScreenConfig):
    """Write report.html of a run, or one page that compares several."""

    runs: Annotated[tuple[Path, ...], Positional()] = ()
    """Folders of runs."""
    out: Path | None = None
    """File to write. Default: report.html in the run's folder, or comparison.html here."""
    lang: Literal["auto", Code] = "auto"
    """Language of a run's report. auto takes the locale's, where it is Japanese."""


PROGRAM = Program(
    name="nkat report",
    config=ReportConfig,
    summary="Write the report of a run again, also of one in progress, or compare several runs on one page.",
    examples=("nkat report runs/quick-20260101-120000", "nkat report runs/first runs/second --out two.html"),
)


def main(argv: Sequence[str]) -> int:
    """Report on the runs that the command line names; return the exit code."""
    config = PROGRAM.configured(argv)
    with screen_of(config) as screen:
        return report(config, screen)


def report(config: ReportConfig, screen: Screen) -> int:
    """Write the page, and print the report of a single run.

    Raises:
        UserError: no folder was given, or a folder that contains no run.
    """
    if not config.runs:
        raise UserError("no run was given; name its folder, e.g. `nkat report runs/quick-20260101-120000`")
    runs = [load_run(folder) for folder in config.runs]
    if len(runs) > 1:
        page = compare_page(runs).save(config.out or Path("comparison.html"))
        document: dict[str, Any] = {"runs": [run.folder.absolute() for run in runs]}
        lines: list[str] = []
    else:
        (run,) = runs
        lang = own_language() if config.lang == "auto" else config.lang
        page = run_page(run, lang).save(config.out or run.folder / REPORT_FILE)
        final_report(run.summary, run.trials, run.stage2, screen, folder=run.folder)
        document = {**run.summary, "folder": run.folder.absolute(), "limits": asdict(limits_of(run))}
        lines = result_lines(run.summary, run.stage2)
    screen.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)
    screen.conclude({**document, "report": page.absolute()}, [*lines, f"report: {page}"])
    return 0
