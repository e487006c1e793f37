"""The command line: `nkat tune | train | evaluate | simulate | report | explain | data | doctor`, and tune_round2.py.

Every flag comes from the configurations' own fields. Bad input ends with one line and exit code 2, before torch or Ray
is loaded.
"""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import tyro
from rich.console import Console

from nkat_ray.config import RunConfig, ScreenConfig, TrainConfig, default_storage_path, field_names
from nkat_ray.exit_codes import BAD_INPUT, FAULT, INTERRUPTED

if TYPE_CHECKING:
    from nkat_ray.report.terminal import Screen

FREE_ON_RESUME = (
    "address",
    "data_dir",
    "dry_run",
    "json",
    "log_to",
    "quiet",
    "resume",
    "verbose",
)  # may differ from the saved run

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _First:
    """The flags that decide which defaults the others get."""

    preset: str = "round2"
    resume: bool = False
    name: str | None = None
    storage_path: str = dataclasses.field(default_factory=default_storage_path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FirstOfTraining:
    """The flag that says which training to resume."""

    out: Path | None = None


def tune(argv: Sequence[str]) -> int:
    """Search: Stage 1, Stage 2, report. The program behind tune_round2.py and `nkat tune`."""
    return _guarded(lambda: _tune(argv))


def main() -> None:
    """The console script `nkat`."""
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if argv else BAD_INPUT)
    command = COMMANDS.get(argv[0])
    if command is None:
        _say_error(f"command is {argv[0]!r}; allowed: {', '.join(COMMANDS)}")
        sys.exit(BAD_INPUT)
    sys.exit(_guarded(lambda: command(argv[1:])))


def _usage() -> str:
    lines = [f"  {name:<10}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "usage: nkat COMMAND [flags]; `nkat COMMAND --help` shows the flags\n\n" + "\n".join(lines)


def _guarded(command: Callable[[], int]) -> int:
    """Run a command; bad input becomes one line and exit code 2, Ctrl-C exit code 130, any other fault exit code 1."""
    try:
        return command()
    except (ValueError, ConnectionError) as error:
        _say_error(" ".join(str(error).split()))
        return BAD_INPUT
    except OSError as error:
        if error.filename is None:  # of no path that somebody gave: a full disk, say
            return _log_fault()
        _say_error(f"{os.fspath(error.filename)!r}: {error.strerror}; choose another path")
        return BAD_INPUT
    except KeyboardInterrupt:
        _say_error("interrupted")
        return INTERRUPTED
    except Exception:
        return _log_fault()


def _log_fault() -> int:
    """An internal fault of a command that has no folder of its own: one line for people, the rest into a file."""
    text = traceback.format_exc()
    handle, log = tempfile.mkstemp(prefix="nkat-", suffix=".log")
    with os.fdopen(handle, "w", errors="backslashreplace") as file:
        file.write(text)
    _say_error(f"{text.strip().splitlines()[-1]}; the log is {log}")
    return FAULT


def _say_error(text: str) -> None:
    Console(stderr=True).print(f"error: {text}", style="bold red", markup=False, highlight=False, soft_wrap=True)


def _on_screen(config: ScreenConfig, command: "Callable[[Screen], int]") -> int:
    """Run a command on a console that does what --quiet and --json say."""
    from nkat_ray.report.terminal import Screen

    screen = Screen(quiet=config.quiet, as_json=config.json)
    with screen.kept_clean():
        return command(screen)


def parse(config: Callable[..., T], argv: Sequence[str], *, prog: str, default: Any = None) -> T:
    """The configuration from flags.

    Raises:
        ValueError: a flag that does not exist or a value that is not allowed, in one line.
        SystemExit: --help was asked for.
    """
    said = io.StringIO()
    extra = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(said):
            parsed: T = tyro.cli(config, args=list(argv), prog=prog, use_underscores=True, **extra)
            return parsed
    except SystemExit as error:
        if error.code in (0, None):
            raise
        raise ValueError(_first_sentence(said.getvalue(), prog)) from None


def _first_sentence(boxed: str, prog: str) -> str:
    """tyro's boxed message as one line: its first section. Its title is in the frame, or above in plain ASCII."""
    lines = (re.sub(r"^[│\s]+|[│\s]+$", "", line) for line in boxed.splitlines())
    parts = itertools.groupby(filter(None, lines), key=lambda line: bool(re.fullmatch(r"[─-]+|[╭╰].*", line)))
    sections = [" ".join(part) for is_rule, part in parts if not is_rule]
    body = sections[0 if boxed.startswith("╭") else 1 :][:1]
    text = re.sub(r"^Error parsing [A-Za-z]*Config: ", "", "".join(body))
    return f"{text}; `{prog} --help` lists the flags" if body else "the command line could not be read"


def typed_flags(argv: Sequence[str]) -> set[str]:
    """Names of the flags that the user typed, in underscore spelling, `--no_` removed."""
    names = {arg[2:].split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")}
    return names | {name.removeprefix("no_") for name in names}


def _tune(argv: Sequence[str]) -> int:
    """Search: Stage 1 on CIFAR-10, the gate, Stage 2 on four datasets, the report."""
    first = _read_first(_First, argv)
    if first.resume and not {"-h", "--help"} & set(argv):
        return _resume(argv, first)
    default = RunConfig.from_preset(first.preset)
    run = parse(RunConfig, argv, prog="tune_round2.py", default=default)
    fixed = typed_flags(argv) & set(run.domains)
    if run.dry_run:
        return _plan(run, fixed)
    from nkat_ray.run import start

    return _on_screen(run, lambda screen: start(run, fixed, screen))


def _read_first(kind: Callable[[], T], argv: Sequence[str]) -> T:
    """Read a few flags among others; the defaults where one is wrong: the full parser says later what it is."""
    known = [arg for arg in argv if arg not in ("-h", "--help")]
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            first, _ = tyro.cli(kind, args=known, use_underscores=True, return_unknown_args=True)
        except SystemExit:
            first = kind()
    return first


def _resume(argv: Sequence[str], first: _First) -> int:
    from nkat_ray.prepare import saved_config

    if first.name is not None:
        RunConfig.from_preset("quick", name=first.name)  # refuses a path instead of a name
    saved, fixed = saved_config(first.storage_path, first.name)
    saved = dataclasses.replace(saved, quiet=False, json=False)
    run = parse(RunConfig, argv, prog="tune_round2.py", default=saved)
    _refuse_disagreement(run, saved)
    if run.dry_run:
        return _plan(run, fixed)
    from nkat_ray.run import resume

    return _on_screen(run, lambda screen: resume(run, fixed, screen))


def _plan(run: RunConfig, fixed: Collection[str]) -> int:
    from nkat_ray.commands.plan import print_plan

    return _on_screen(run, lambda screen: print_plan(run, fixed, screen))


def _train(argv: Sequence[str]) -> int:
    """Train one configuration on one dataset."""
    from nkat_ray.commands.train import saved_training, train

    if "resume" not in typed_flags(argv) or {"-h", "--help"} & set(argv):
        config = parse(TrainConfig, argv, prog="nkat train")
        return _on_screen(config, lambda screen: train(config, screen))
    first = _read_first(_FirstOfTraining, argv)
    saved = dataclasses.replace(saved_training(first.out), quiet=False, json=False)
    resumed = parse(TrainConfig, argv, prog="nkat train", default=saved)
    _refuse_disagreement(resumed, saved)
    return _on_screen(resumed, lambda screen: train(resumed, screen))


def _evaluate(argv: Sequence[str]) -> int:
    """Stage 2 alone, on a run's survivors or on one model."""
    from nkat_ray.commands.evaluate import EvaluateConfig, evaluate, with_defaults_of

    typed = parse(EvaluateConfig, argv, prog="nkat evaluate")
    default = with_defaults_of(typed.target, official=typed.official)
    config = parse(EvaluateConfig, argv, prog="nkat evaluate", default=default)
    if config.official:
        from nkat_ray.commands.official import recalculate

        return _on_screen(config, lambda screen: recalculate(config, screen))
    return _on_screen(config, lambda screen: evaluate(config, screen))


def _simulate(argv: Sequence[str]) -> int:
    """What the targets ask for under each lambda, and where the notes contradict themselves."""
    from nkat_ray.commands.simulate import SimulateConfig, simulate

    config = parse(SimulateConfig, _split_assignments(argv), prog="nkat simulate")
    return _on_screen(config, lambda screen: simulate(config, screen))


def _report(argv: Sequence[str]) -> int:
    """The report of a run again, or several runs side by side."""
    from nkat_ray.commands.report import ReportConfig, report

    config = parse(ReportConfig, argv, prog="nkat report")
    return _on_screen(config, lambda screen: report(config, screen))


def _explain(argv: Sequence[str]) -> int:
    """What a trained model looks at: attention maps, rollout, heads, as pictures and a page."""
    from nkat_ray.commands.explain import ExplainConfig, explain

    return explain(parse(ExplainConfig, argv, prog="nkat explain"), Console())


def _data(argv: Sequence[str]) -> int:
    """List, fetch, verify and import datasets."""
    from nkat_ray.commands.data import Command, data

    return data(parse(cast(Any, Command), argv or ["list"], prog="nkat data"), Console())


def _doctor(argv: Sequence[str]) -> int:
    """Check a machine or a cluster before time and money are spent."""
    from nkat_ray.commands.doctor import DoctorConfig, doctor

    return doctor(parse(DoctorConfig, argv, prog="nkat doctor"), Console())


def _split_assignments(argv: Sequence[str]) -> list[str]:
    """`mnist=0.99` as the two words that tyro reads into a dict.

    Raises:
        ValueError: what follows the `=` is no number; tyro would not say which one.
    """
    split: list[str] = []
    for arg in argv:
        name, sign, value = arg.partition("=")
        if not sign or arg.startswith("-"):
            split.append(arg)
            continue
        try:
            float(value)
        except ValueError:
            raise ValueError(f"accuracy of {name} is {value!r}; allowed: 0..1, as in mnist=0.99") from None
        split += [name, value]
    return split


def _refuse_disagreement(now: Any, saved: Any) -> None:
    """A run goes on as it began.

    Raises:
        ValueError: a typed flag differs from what was saved.
    """
    for name in field_names(type(saved)):
        typed, before = getattr(now, name), getattr(saved, name)
        if name not in FREE_ON_RESUME and typed != before:
            advice = "leave the flag out, or start anew"
            raise ValueError(f"{name} is {typed!r}; what is to be resumed has {before!r}; {advice}")


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "tune": _tune,
    "train": _train,
    "evaluate": _evaluate,
    "simulate": _simulate,
    "report": _report,
    "explain": _explain,
    "data": _data,
    "doctor": _doctor,
}
