"""The run that all stages share, prepared once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nkat_ray.config import RunConfig
from nkat_ray.data.suite import Datasets
from nkat_ray.record.journal import Journal, RunState, WarmTrial
from nkat_ray.record.storage import RunStorage
from nkat_ray.space import Domain


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run whose inputs have been validated."""

    config: RunConfig
    domains: Mapping[str, Domain]  # searched parameters and their domains, without those that the user fixed
    datasets: Datasets  # the datasets of Stage 2, including that of Stage 1
    storage: RunStorage  # the run's folder, and its copy in a bucket
    journal: Journal
    warm: Sequence[WarmTrial] = ()  # trials of the run that `--warm_start` names

    @property
    def folder(self) -> Path:
        """The run's local folder."""
        return self.storage.local

    @property
    def state(self) -> RunState:
        """The state of the journal."""
        return self.journal.state
