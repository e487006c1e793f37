"""Writes docs/reference.md from the configurations' own docs, the search spaces, the presets and the tables.

python docs/reference.py
"""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nkat_ray.cli import COMMANDS
from nkat_ray.commands.data import Fetch, Import, List, Verify
from nkat_ray.commands.doctor import DoctorConfig
from nkat_ray.commands.evaluate import EvaluateConfig
from nkat_ray.commands.explain import ExplainConfig
from nkat_ray.commands.plan import describe_domain
from nkat_ray.commands.report import ReportConfig
from nkat_ray.commands.simulate import SimulateConfig
from nkat_ray.config import (
    PRESETS,
    SPACES,
    DataConfig,
    ModelConfig,
    RunConfig,
    ScreenConfig,
    TrainConfig,
    TrialConfig,
    searchable,
)
from nkat_ray.files import CURVES_FILE, STAGE2_FILE, TRIALS_FILE
from nkat_ray.report import tables

TARGET = Path(__file__).with_name("reference.md")
SHARED = {
    "The network": ModelConfig, "The recipe": TrialConfig, "Where images come from": DataConfig,
    "What is printed": ScreenConfig,
}  # fmt: skip
CONFIGS: dict[str, tuple[type, ...]] = {
    "tune": (RunConfig,), "train": (TrainConfig,), "evaluate": (EvaluateConfig,), "simulate": (SimulateConfig,),
    "report": (ReportConfig,), "explain": (ExplainConfig,), "data": (List, Fetch, Verify, Import),
    "doctor": (DoctorConfig,),
}  # fmt: skip
HEAD = """# Reference

Every flag, search space, preset and column. This page is written by `python docs/reference.py` from the code; a test
fails where it is stale. Flags may be spelled with `_` or `-`; a flag that is true or false is typed `--flag` or
`--no_flag`; `off` and `auto` are words to type. [spec.md](spec.md) says what the terms mean.
"""


def reference() -> str:
    """The whole page."""
    parts = [HEAD, "## Flags that several commands share\n"]
    for title, config in SHARED.items():
        parts += [f"### {title}\n", _flags(config, _own(config))]
    parts.append("## The commands\n")
    for name, configs in CONFIGS.items():
        parts.append(f"### nkat {name}\n\n{_first_line(COMMANDS[name])}\n")
        for config in configs:
            if len(configs) > 1:
                parts.append(f"`nkat {name} {config.__name__.lower()}`: {_first_line(config)}\n")
            parts += [_flags(config, _rest(config)), _also(config)]
    parts += ["## Search spaces\n", _spaces(), "## Presets\n", _presets(), "## Tables\n", *_tables()]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _first_line(documented: Any) -> str:
    return (documented.__doc__ or "").splitlines()[0]


def _own(config: type) -> list[str]:
    """Fields that the class itself adds."""
    return [name for name in field_docs(config) if name in vars(config).get("__annotations__", {})]


def _rest(config: type) -> list[str]:
    """Fields that stand in no shared table; without those that are no flags."""
    shared = {name for base in SHARED.values() if issubclass(config, base) for name in _own(base)}
    hints = typing.get_type_hints(config, include_extras=True)
    names = [field.name for field in dataclasses.fields(config)]
    return [name for name in names if name not in shared and "Fixed" not in str(hints[name])]


def _also(config: type) -> str:
    taken = [f"*{title.lower()}*" for title, base in SHARED.items() if issubclass(config, base)]
    return f"Also the flags of {', '.join(taken)}.\n" if taken else ""


def _flags(config: type, names: list[str]) -> str:
    if not names:
        return ""
    docs, fields = field_docs(config), {field.name: field for field in dataclasses.fields(config)}
    hints = typing.get_type_hints(config, include_extras=True)
    rows = []
    for name in names:
        positional = "Positional" in str(hints[name])
        flag = name.upper() if positional else f"--{name}"
        rows.append((f"`{flag}`", _default(fields[name], hints[name]), docs[name]))
    return _table(("flag", "default", "what"), rows)


def _default(field: dataclasses.Field[Any], hint: Any) -> str:
    if field.default_factory is not dataclasses.MISSING:  # the text says where it comes from
        return ""
    if field.default is dataclasses.MISSING:
        return "(needed)"
    if field.default is None:
        words = [getattr(item, "metavar", "") for item in getattr(hint, "__metadata__", ())]
        return next((f"`{word.split('|')[1]}`" for word in words if "|" in word), "")
    return f"`{_word(field.default)}`" if field.default != () else ""


def _word(value: Any) -> str:
    if value is None:
        return "off"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(_word, value)) if isinstance(value, tuple) else str(value)


def field_docs(config: type) -> dict[str, str]:
    """The text under each field, in order of definition, those of the base classes first."""
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


def _spaces() -> str:
    names = sorted(set().union(*SPACES.values()), key=list(searchable()).index)
    rows = [
        (f"`{name}`", *(describe_domain(space[name]) if name in space else "" for space in SPACES.values()))
        for name in names
    ]
    closing = f"A space of your own (`--space NAME.toml`) may hold {', '.join(f'`{name}`' for name in searchable())}.\n"
    return _table(("parameter", *SPACES), rows) + "\n" + closing


def _presets() -> str:
    names = [name for name in {**PRESETS["quick"], **PRESETS["laptop"]} if name != "preset"]
    configs = [RunConfig.from_preset(preset) for preset in PRESETS]
    return _table(
        ("flag", *PRESETS),
        [(f"`--{name}`", *(f"`{_word(getattr(config, name))}`" for config in configs)) for name in names],
    )


def _tables() -> list[str]:
    schemas = {
        TRIALS_FILE: tables.TRIALS_SCHEMA, CURVES_FILE: tables.CURVES_SCHEMA,
        STAGE2_FILE: tables.STAGE2_SCHEMA,
    }  # fmt: skip
    return [
        f"`{name}`: " + ", ".join(f"`{field.name}` ({field.type})".replace("item: ", "") for field in schema) + ".\n"
        for name, schema in schemas.items()
    ]


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    print(TARGET)
