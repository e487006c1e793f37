"""A trial that passed the gate, with what Stage 2 needs: location of its weights, lambda, resources."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nkat_ray.cluster.resources import Cluster, Share, trial_share
from nkat_ray.config import RunConfig
from nkat_ray.files import WEIGHTS_FILE
from nkat_ray.metrics import LAMBDA_MODELS, lambda_theory
from nkat_ray.model import count_nkat_parameters, count_parameters
from nkat_ray.record.journal import TrialRecord
from nkat_ray.space import trial_config
from nkat_ray.train.checkpoint import Weights


@dataclass(frozen=True, kw_only=True)
class Survivor:
    """A trial that passed the gate, or a single network that is treated like one."""

    trial: int
    epoch: int | None = None  # epoch of the best weights so far; None for a single network
    checkpoints: Sequence[str]  # on disk, newest first, in case the object store has lost the weights
    conv_stem: str
    embed_dim: int
    nkat_parameters: int
    parameters: int
    share: Share  # resources of a task

    def lambdas(self) -> dict[str, float]:
        """Return lambda_theory under each of the three models (docs/spec.md section 2)."""
        facts = {name: getattr(self, name) for name in ("conv_stem", "embed_dim", "nkat_parameters", "parameters")}
        return {model: lambda_theory(model, **facts) for model in LAMBDA_MODELS}


def survivor_of(record: TrialRecord, config: RunConfig, cluster: Cluster) -> Survivor:
    """Create a survivor from a trial that passed the gate.

    Args:
        record: the trial, with at least one epoch.
    """
    trial, last = trial_config(config, record.params), record.curve[max(record.curve)]
    return Survivor(
        trial=record.trial, epoch=record.best_epoch, checkpoints=record.checkpoints[::-1], conv_stem=trial.conv_stem,
        embed_dim=trial.embed_dim, nkat_parameters=last["nkat_parameters"], parameters=last["parameters"],
        share=trial_share(trial, config, cluster),
    )  # fmt: skip


def model_survivor(folder: Path, share: Share, *, trial: int = 0) -> Survivor:
    """Create a survivor from a single network."""
    weights = Weights.from_bytes((folder / WEIGHTS_FILE).read_bytes())
    model, config = weights.build(), weights.config
    return Survivor(
        trial=trial, checkpoints=[str(folder.absolute())], conv_stem=config.conv_stem, embed_dim=config.embed_dim,
        nkat_parameters=count_nkat_parameters(model), parameters=count_parameters(model), share=share,
    )  # fmt: skip
