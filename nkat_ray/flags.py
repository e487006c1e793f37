"""Derive command-line flags from a configuration's fields: parse them, report errors in one line, print `--help`.

A `Program` returns only the flags that were typed. All others keep the default of a preset, of a run that is resumed,
or of the configuration. This module loads neither torch nor Ray.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, TypeVar, get_args, get_origin

from nkat_ray import __version__
from nkat_ray.config import ModelConfig, TrialConfig, field_names
from nkat_ray.errors import UserError, suggestion
from nkat_ray.fields import FieldType, field_type, field_types, place_fault

T = TypeVar("T", bound=Any)

HELP_WIDTH: Final = 100  # columns at most
INDENT: Final = 31  # column of a flag's text


@dataclass(frozen=True, kw_only=True)
class Program:
    """A command of the command line; its flags are the fields of `config`."""

    name: str  # as one types it: "nkat train"
    config: type
    summary: str
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)  # heading -> flags of `--help`; empty: all
    more: Mapping[str, Sequence[str]] = field(default_factory=dict)  # those that only `--help_all` shows
    examples: Sequence[str] = ()
    removed: Mapping[str, str] = field(default_factory=dict)  # "--flag" or "--flag value" -> what replaced it

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """Parse the words of a command line; return the fields that were typed, with their values.

        Raises:
            UserError: a flag does not exist, or a value is not allowed.
            SystemExit: `--help`, `--help_all` or `--version` was typed; it has been printed.
        """
        words = [_underscored(word) for word in argv]
        if {"-h", "--help", "--help_all"} & set(words):
            print(help_page(self, everything="--help_all" in words))
            raise SystemExit(0)
        if "--version" in words:
            print(f"nkat-ray {__version__}")
            raise SystemExit(0)
        self._refuse_removed(words)
        typed, unknown = self._parser().parse_known_args(_joined(words))
        if unknown:
            self._refuse_unknown(unknown[0])
        return vars(typed)

    def configured(self, argv: Sequence[str]) -> Any:
        """Return the configuration that a command line means; raises what `read` raises."""
        return self.config(**self.read(argv))

    def take(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Convert settings given as Python values, by name of the field, to the types of the fields.

        A value may be text, as on the command line (`top_p="off"`, `data_dir="images"`), and a list stands for a tuple.
        Ranges are checked later, when the configuration is created.

        Raises:
            UserError: a setting does not exist or was removed, or a path is not valid.
        """
        kinds = field_types(self.config)
        for name, value in settings.items():
            self._refuse_removed([f"--{name}", str(value)])
            if name not in kinds:
                advice = suggestion(name, kinds) or f"; `{self.name} --help_all` lists the settings"
                raise UserError(f"there is no setting {name!r}{advice}")
        return {name: _field_value(name, kinds[name], value) for name, value in settings.items()}

    def _parser(self) -> "_Parser":
        parser = _Parser(prog=self.name, add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        parser.kinds = field_types(self.config)
        needed = {
            item.name
            for item in dataclasses.fields(self.config)
            if item.default is item.default_factory is dataclasses.MISSING
        }
        for name, kind in field_types(self.config).items():
            if kind.core is bool:
                parser.add_argument(f"--{name}", dest=name, action="store_true")
                parser.add_argument(f"--no_{name}", dest=name, action="store_false")
            elif kind.positional:
                parser.add_argument(name, nargs=_arity(kind), action=_Store, kind=kind)
            else:
                parser.add_argument(f"--{name}", nargs=_arity(kind), action=_Store, kind=kind, required=name in needed)
        return parser

    def _refuse_removed(self, words: Sequence[str]) -> None:
        spaced = " ".join(words).replace("=", " ") + " "
        for flag, advice in self.removed.items():
            if f"{flag} " in spaced:
                raise UserError(f"{flag} was removed; {advice}")

    def _refuse_unknown(self, word: str) -> NoReturn:
        flags = [f"--{name}" for name in field_types(self.config)]
        advice = f"; `{self.name} --help` lists the flags"
        if not re.match(r"--\w", word):
            raise UserError(f"{word!r} belongs to no flag{advice}")
        flag = word.partition("=")[0]
        raise UserError(f"there is no flag {flag}{suggestion(flag, flags) or advice}")


class _Parser(argparse.ArgumentParser):
    kinds: Mapping[str, FieldType]

    def error(self, message: str) -> NoReturn:
        flag = message.removeprefix("argument ").partition(": ")[0]
        name = flag.removeprefix("--").removeprefix("no_")
        if name in self.kinds and self.kinds[name].core is bool:
            raise UserError(f"{flag} takes no value; type --{name} or --no_{name}")
        if name in self.kinds:
            raise UserError(f"{flag} needs a value; allowed: {self.kinds[name]}")
        raise UserError(f"{message}; `{self.prog} --help` lists the flags")


class _Store(argparse.Action):
    """Convert the typed words to a field's value and store it."""

    def __init__(self, *, kind: FieldType, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.kind = kind

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        words = [values] if isinstance(values, str) else list(values)
        setattr(namespace, self.dest, value_of(self.dest, self.kind, words))


def takes_flags(program: Program, *, without: Collection[str] = ()) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Let a function take a program's flags as keyword arguments (`Program.take`), visible in `help` and completion.

    Args:
        without: flags that exist only on the command line.
    """

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(function)
        def call(**settings: Any) -> T:
            for name in without:
                if name in settings:
                    raise UserError(f"{name} is {settings[name]!r}; only the command line has --{name}; leave it out")
            return function(**program.take(settings))

        shown = [item for name, item in inspect.signature(program.config).parameters.items() if name not in without]
        returns = inspect.signature(function).return_annotation
        call.__signature__ = inspect.Signature(shown, return_annotation=returns)  # type: ignore[attr-defined]
        return call

    return decorate


def more_of_trial(*shown: str) -> dict[str, list[str]]:
    """Return the flags of network and recipe for `--help_all`, by heading, without those that `--help` shows."""
    names = {"The network": field_names(ModelConfig), "The recipe": field_names(TrialConfig)}
    taken, more = set(shown), {}
    for title, group in names.items():
        more[title] = [name for name in group if name not in taken]
        taken |= set(group)
    return more


def continued(saved: T, typed: Mapping[str, Any], free: Collection[str]) -> T:
    """Apply the flags typed now to a saved configuration; only flags in `free` may change a saved value.

    Raises:
        UserError: another flag differs from the saved value.
    """
    for name, value in typed.items():
        before = getattr(saved, name)
        if name not in free and value != before:
            raise UserError(f"{name} is {value!r}; what is to be resumed has {before!r}; leave it out, or start anew")
    return dataclasses.replace(saved, **typed)


def value_of(name: str, kind: FieldType, words: Sequence[str]) -> Any:
    """Convert the typed words to a field's value.

    Raises:
        UserError: the words are not an allowed value.
    """
    if kind.none_word is not None and list(words) == [kind.none_word]:
        return None
    if get_origin(kind.core) is dict:
        return _pairs(name, words)
    if kind.place and words and (fault := place_fault(words[0])):
        raise UserError(f"{name} is {words[0]!r}; {fault}; allowed: {kind}")
    if get_origin(kind.core) is tuple:
        parts = get_args(kind.core)
        kinds = parts[:1] * len(words) if ... in parts else parts
        if len(kinds) == len(words):
            return tuple(value_of(name, field_type(part), [word]) for part, word in zip(kinds, words, strict=True))
    else:
        try:
            return _readers(kind.core)(words[0])
        except (ValueError, IndexError):  # IndexError: argparse drops a value that is `--`
            pass
    near = suggestion(words[0], get_args(kind.core)) if words and get_origin(kind.core) is Literal else ""
    raise UserError(f"{name} is {' '.join(words)!r}; allowed: {kind}{near}")


def _field_value(name: str, kind: FieldType, value: Any) -> Any:
    """Convert a Python value to the type of a field: the word for None to None, a list to a tuple, text to a path."""
    if isinstance(value, str) and (kind.core is Path or value == kind.none_word):
        return value_of(name, kind, [value])
    if isinstance(value, os.PathLike) and kind.core is str:
        return os.fspath(value)
    return tuple(value) if isinstance(value, list) else value


def _readers(core: Any) -> Callable[[str], Any]:
    """Return the function that converts a word to a type; it raises a ValueError if the word does not fit."""
    if get_origin(core) is Literal:
        return partial(_choice, get_args(core))
    readers: dict[Any, Callable[[str], Any]] = {int: int, float: float, Path: Path}
    return readers.get(core, str)


def _choice(choices: Sequence[Any], word: str) -> Any:
    return choices[[str(choice) for choice in choices].index(word)]


def _pairs(name: str, words: Sequence[str]) -> dict[str, float]:
    """Parse numbers by name: `mnist=0.99 cifar10=0.8`, or the same with spaces."""
    flat = [part for word in words for part in word.split("=", 1)]
    if len(flat) % 2:
        raise UserError(f"{name} is {' '.join(words)!r}; allowed: names with numbers, as in mnist=0.99")
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return {key: value_of(f"{name} of {key}", field_type(float), [value]) for key, value in pairs}


def _arity(kind: FieldType) -> str | None:
    return "*" if get_origin(kind.core) in (tuple, dict) else None


def _underscored(word: str) -> str:
    """Replace the hyphens in a flag's name: `--num-samples=3` becomes `--num_samples=3`."""
    name, sign, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + sign + value if word.startswith("--") else word


def _joined(words: Sequence[str]) -> list[str]:
    """Join negative numbers to their flag, since argparse treats `-1e9` and `-inf` as flags."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and re.match(r"-(\d|\.|inf|nan)", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


# --- help -------------------------------------------------------------------------------------------------------------


def help_page(program: Program, *, everything: bool = False) -> str:
    """Return the text of `--help` (first sentences only), or of `--help_all` (every flag, with its range)."""
    width = min(HELP_WIDTH, shutil.get_terminal_size().columns)
    kinds = field_types(program.config)
    groups = program.groups or {"Flags": sorted(kinds, key=lambda name: not kinds[name].positional)}
    hidden = sum(map(len, program.more.values()))
    if everything:
        groups = {**groups, **program.more}
    positional = " ".join(name.upper() for name, kind in kinds.items() if kind.positional)
    lines = [f"usage: {program.name}{' ' + positional if positional else ''} [flags]", ""]
    lines += textwrap.wrap(program.summary, width)
    for title, names in groups.items():
        lines += ["", f"{title}:", *flag_lines(program.config, names, width=width, everything=everything)]
    if program.examples:
        lines += ["", "Examples:", *(f"  {example}" for example in program.examples)]
    if not everything:
        lines += ["", f"`--help_all` shows {f'{hidden} more flags, ' if hidden else ''}all details and ranges."]
    return "\n".join(lines)


def flag_lines(config: type, names: Collection[str], *, width: int, everything: bool) -> list[str]:
    """Format flags for the help in two columns: the flag; its text, range and default."""
    kinds, docs, defaults = field_types(config), field_docs(config), default_texts(config)
    lines: list[str] = []
    for name in names:
        text = docs[name] if everything else docs[name].split(". ")[0].rstrip(".")
        bounds = f" ({kinds[name].bounds})" if everything and str(kinds[name].bounds) else ""
        default = f" [{defaults[name]}]" if defaults[name] else ""
        flag = f"  {flag_text(name, kinds[name])}"
        first = flag.ljust(INDENT) if len(flag) < INDENT else flag + "\n" + " " * INDENT
        body = textwrap.wrap(text + bounds + default, max(width - INDENT, 20), break_on_hyphens=False)
        lines += (first + ("\n" + " " * INDENT).join(body)).split("\n")
    return lines


def flag_text(name: str, kind: FieldType) -> str:
    """Return a flag with a placeholder for its value: `--depth N`."""
    if kind.core is bool:
        return f"--{name}"
    if get_origin(kind.core) is Literal:
        value = "|".join(map(str, get_args(kind.core)))
    elif get_origin(kind.core) is tuple:
        parts = get_args(kind.core)
        value = "NAME ..." if ... in parts else " ".join("N" for _ in parts)
    else:
        value = {int: "N", float: "X", Path: "PATH", str: "TEXT"}.get(kind.core, "NAME=X ...")
    value += f"|{kind.none_word}" if kind.none_word else ""
    return name.upper() if kind.positional else f"--{name} {value}"


def default_texts(config: type) -> dict[str, str]:
    """Return the default of each field as one types it; empty if there is none, or if the field's text states it."""
    texts = {}
    for item in dataclasses.fields(config):
        known = not any(item.default is nothing for nothing in (dataclasses.MISSING, False, ()))
        texts[item.name] = typed_text(item.default, field_types(config)[item.name].none_word or "") if known else ""
    return texts


def typed_text(value: Any, none_word: str = "off") -> str:
    """Format a value as one types it."""
    if value is None:
        return none_word
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def field_docs(config: type) -> dict[str, str]:
    """Return the docstring of each field, in order of definition; the fields of base classes come first."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if dataclasses.is_dataclass(base):
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(tree, ast.ClassDef)
            for line, after in zip(tree.body, tree.body[1:], strict=False):
                if isinstance(line, ast.AnnAssign) and isinstance(after, ast.Expr):
                    assert isinstance(line.target, ast.Name)
                    found[line.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return found
