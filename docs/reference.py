"""Writes docs/reference.md from the configurations' own docs, the search spaces, the presets and the tables.

python docs/reference.py
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nkat_ray.cli import COMMANDS
from nkat_ray.commands.data import Fetch, Import, List, Verify
from nkat_ray.commands.doctor import DoctorConfig
from nkat_ray.commands.evaluate import EvaluateConfig
from nkat_ray.commands.explain import ExplainConfig
from nkat_ray.commands.report import ReportConfig
from nkat_ray.commands.simulate import SimulateConfig
from nkat_ray.commands.stop import StopConfig
from nkat_ray.commands.train import TrainConfig
from nkat_ray.config import (
    PRESETS,
    ClusterConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    ScreenConfig,
    Stage2Config,
    TrialConfig,
)
from nkat_ray.fields import field_types
from nkat_ray.files import CURVES_FILE, STAGE2_FILE, TRIALS_FILE
from nkat_ray.flags import default_texts, field_docs, typed_text
from nkat_ray.record import tables
from nkat_ray.space import SPACES, describe_domain, searchable

TARGET = Path(__file__).with_name("reference.md")
SHARED = {
    "The network": ModelConfig, "The recipe": TrialConfig, "Where images come from": DataConfig,
    "What to run on": ClusterConfig, "Stage 2": Stage2Config, "What is printed": ScreenConfig,
}  # fmt: skip
CONFIGS: dict[str, tuple[type, ...]] = {
    "tune": (RunConfig,), "train": (TrainConfig,), "evaluate": (EvaluateConfig,), "simulate": (SimulateConfig,),
    "report": (ReportConfig,), "stop": (StopConfig,), "explain": (ExplainConfig,),
    "data": (List, Fetch, Verify, Import), "doctor": (DoctorConfig,),
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
        parts.append(f"### nkat {name}\n\n{COMMANDS[name]}\n")
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
    """Fields that no shared table lists."""
    shared = {name for base in SHARED.values() if issubclass(config, base) for name in _own(base)}
    return [name for name in field_types(config) if name not in shared]


def _also(config: type) -> str:
    taken = [f"*{title.lower()}*" for title, base in SHARED.items() if issubclass(config, base)]
    return f"Also the flags of {', '.join(taken)}.\n" if taken else ""


def _flags(config: type, names: list[str]) -> str:
    if not names:
        return ""
    docs, kinds, defaults = field_docs(config), field_types(config), default_texts(config)
    rows = [
        (
            f"`{name.upper() if kinds[name].positional else f'--{name}'}`",
            f"`{defaults[name]}`" if defaults[name] else "",
            str(kinds[name].bounds),
            docs[name],
        )
        for name in names
    ]
    return _table(("flag", "default", "range", "what"), rows)


def _spaces() -> str:
    names = sorted(set().union(*SPACES.values()), key=list(searchable()).index)
    rows = [
        (f"`{name}`", *(describe_domain(space[name]) if name in space else "" for space in SPACES.values()))
        for name in names
    ]
    closing = f"A space of your own (`--space NAME.toml`) may hold {', '.join(f'`{name}`' for name in searchable())}.\n"
    return _table(("parameter", *SPACES), rows) + "\n" + closing


def _presets() -> str:
    names = [name for name in {**PRESETS["quick"], **PRESETS["laptop"], **PRESETS["gpu"]} if name != "preset"]
    configs = [RunConfig.from_preset(preset) for preset in PRESETS]
    return _table(
        ("flag", *PRESETS),
        [(f"`--{name}`", *(f"`{typed_text(getattr(config, name))}`" for config in configs)) for name in names],
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
