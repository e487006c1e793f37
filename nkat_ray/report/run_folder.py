"""A run's folder as the report reads it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nkat_ray.config import SPACES, Domain
from nkat_ray.domains import domain_of_json
from nkat_ray.exit_codes import RESUMABLE
from nkat_ray.files import CONFIG_FILE, CURVES_FILE, STAGE2_FILE, SUMMARY_FILE, TRIALS_FILE
from nkat_ray.metrics import NOTES_GATE
from nkat_ray.report import tables


@dataclass(frozen=True)
class Run:
    """A run folder's files; what is not there yet is empty."""

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    trials: Sequence[Mapping[str, Any]] = ()
    curves: Sequence[Mapping[str, Any]] = ()
    stage2: Sequence[Mapping[str, Any]] = ()

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.config.get("name") or self.folder.name)

    @property
    def gate(self) -> float:
        """Local TPE that a trial had to reach."""
        return float(self.summary.get("gate", self.config.get("gate", NOTES_GATE)))

    @property
    def known(self) -> dict[str, Any]:
        """The summary, or what is known of it before it is written."""
        data = self.config.get("found", {})
        start = {"gate": self.gate, "preset": self.config.get("preset"), "data": data}
        return {"winner": None, "exit_code": None, **start, **self.summary}

    @property
    def winner(self) -> int | None:
        """The best survivor's number, once Stage 2 has named it."""
        winner = self.summary.get("winner")
        return winner["trial"] if winner else None

    @property
    def ended(self) -> bool:
        """Whether the run has come to its end; an interrupted one has not."""
        return self.summary.get("exit_code") not in RESUMABLE

    @property
    def searched(self) -> list[str]:
        """Names of the searched parameters."""
        return list(self.domains or SPACES["round2"])

    @property
    def domains(self) -> Mapping[str, Domain]:
        """What each of them might be; empty where the run does not say."""
        own = self.config.get("own_space")
        if own:
            return {name: domain_of_json(domain) for name, domain in own.items()}
        return SPACES.get(str(self.config.get("space")), {})


def load_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        ValueError: the folder is not there, or holds none of a run's files.
    """
    readers: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "config": (CONFIG_FILE, tables.read_summary),
        "summary": (SUMMARY_FILE, tables.read_summary),
        "trials": (TRIALS_FILE, tables.read_trials),
        "curves": (CURVES_FILE, tables.read_curves),
        "stage2": (STAGE2_FILE, tables.read_stage2),
    }
    found: dict[str, Any] = {
        name: read(folder / file) for name, (file, read) in readers.items() if (folder / file).is_file()
    }
    if not found:
        raise ValueError(f"{folder} holds no run; a run's folder has {', '.join(file for file, _ in readers.values())}")
    return Run(folder, **found)
