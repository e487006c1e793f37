"""Train a trial on a worker: a thin adapter between the `Trainer` and Ray Tune's reports and checkpoints."""

import math
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.actor import ActorHandle

from nkat_ray.config import RunConfig, TrialConfig
from nkat_ray.cost import GIB, GPU_CONTEXT_BYTES, peak_bytes
from nkat_ray.data.dataset import Traits
from nkat_ray.data.selection import Selection
from nkat_ray.files import WEIGHTS_FILE
from nkat_ray.metrics import (
    BEST_LOCAL_TPE,
    LAMBDA_THEORY,
    LOCAL_TPE,
    NOTICES,
    SECONDS_LEFT,
    tpe_score,
)
from nkat_ray.model import count_nkat_parameters, count_parameters, lambdas
from nkat_ray.search.stops import at_last_epoch, out_of_time
from nkat_ray.search.vault import deposit
from nkat_ray.space import trial_config
from nkat_ray.train.checkpoint import STATE_FILE, first_whole_state, state_bytes
from nkat_ray.train.device import device_for
from nkat_ray.train.loop import EpochResult, Trainer
from nkat_ray.train.session import create_trainer, training_data


@dataclass(frozen=True, kw_only=True)
class Stage1Data(Traits):
    """CIFAR-10's images for Stage 1, shared by all trials: one copy per node, in the object store."""

    selection: Selection


@dataclass
class _Best:
    """A trial's best Local TPE so far and its weights; -inf and None before the first score."""

    score: float = -math.inf
    weights: bytes | None = None


def train_trial(
    params: Mapping[str, Any],
    *,
    run: RunConfig,
    data: Stage1Data,
    vault: ActorHandle[Any],
) -> None:
    """Train one trial, report every epoch to Tune, and state the reason if the trial ends by itself.

    A report includes a checkpoint every `checkpoint_epochs` epochs, at the last epoch, and whenever a survivor's score
    improves.

    Args:
        params: the proposed values, with `trial`, `seed`, `resume_from` (checkpoints of an earlier driver, newest
            first) and `seconds_left` (of Stage 1, counted from the start of the trial; None without a limit).
    """
    deadline_s = math.inf if params[SECONDS_LEFT] is None else time.time() + params[SECONDS_LEFT]
    config = trial_config(run, params)
    resources = tune.get_context().get_trial_resources().required_resources
    cpus, gpus = int(resources.get("CPU", 1)), resources.get("GPU", 0.0)
    device = device_for(gpus, cpus)
    notices: list[str] = []
    if device.type == "cuda" and (warning := gpu_memory_warning(config, gpus)):
        notices.append(warning)
    trainer = create_trainer(
        config,
        training_data(data.selection, data, device),
        seed=params["seed"],
        notice=notices.append,
        deadline_s=deadline_s,
    )
    counts = {"nkat_parameters": count_nkat_parameters(trainer.model), "parameters": count_parameters(trainer.model)}
    lam = lambdas(trainer.model, config)[run.lambda_model]
    best = _continue(trainer, params["resume_from"])
    if params["resume_from"] and trainer.epoch == 0:
        notices.append("all of its checkpoints are damaged: it starts again")
    facts = {"node": socket.gethostname(), "gpus": gpus, "cpus": cpus, LAMBDA_THEORY: lam, **counts}
    explained = False  # whether the gate ends the trial: at a loss that is not finite, and at the last epoch
    for result in trainer.epochs():
        score, last = _score(result, lam), result.epoch >= run.epochs
        finite, better = math.isfinite(score), score > best.score  # False for NaN
        if better:
            weights = trainer.weights(val_accuracy=result.val_accuracy).to_bytes()
            best = _Best(score, weights)
            if score >= run.gate and not deposit(vault, params["trial"], score, weights):
                notices.append("the vault is gone: the weights are kept on disk only")
        best_score = best.score if best.score > -math.inf else math.nan
        row = {**asdict(result), LOCAL_TPE: score, BEST_LOCAL_TPE: best_score, **facts}
        if finite:
            row |= {**trainer.attention_entropy(), **trainer.nkat_scalars()}
        explained = last or not finite
        if last and best.score >= run.gate:
            row |= at_last_epoch(result.epoch, best.score, run.gate).columns()
        due = last or result.epoch % run.checkpoint_epochs == 0
        kept = finite and (due or (better and score >= run.gate))
        with _checkpoint(trainer, best) if kept else nullcontext() as checkpoint:
            tune.report({**row, NOTICES: list(notices)}, checkpoint=checkpoint)
        notices.clear()
    if not explained:  # the time is up, or the checkpoint was of the last epoch
        epoch = trainer.epoch
        stop = out_of_time(epoch) if epoch < run.epochs else at_last_epoch(epoch, best.score, run.gate)
        tune.report({**stop.columns(), NOTICES: notices})


def gpu_memory_warning(config: TrialConfig, gpus: float) -> str | None:
    """Return one line if a trial may not fit into the memory of its share of the GPU, else None."""
    free, total = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved()  # cached by this process for an earlier trial, and reused by this one
    share, needed = int(min(1.0, gpus) * total), peak_bytes(config) + GPU_CONTEXT_BYTES
    if needed <= min(share, free):
        return None
    return (
        f"about {needed / GIB:.1f} GiB of GPU memory are needed; its share is {share / GIB:.1f} GiB and "
        f"{free / GIB:.1f} GiB are free: batches are split where they do not fit"
    )


def _score(result: EpochResult, lam: float) -> float:
    return tpe_score(result.val_accuracy, lam) if math.isfinite(result.val_accuracy) else math.nan


def _continue(trainer: Trainer, earlier: list[str]) -> _Best:
    """Load the newest intact checkpoint, of this driver or an earlier one."""
    with ExitStack() as stack:
        folders = (Path(stack.enter_context(c.as_directory())) for c in _checkpoints(earlier))
        found = first_whole_state(folders)
        if found is None:
            return _Best()
        folder, state = found
        trainer.load_state(state["trainer"])
        weights = folder / WEIGHTS_FILE
        return _Best(state["best"], weights.read_bytes() if weights.exists() else None)


def _checkpoints(earlier: list[str]) -> Iterator[tune.Checkpoint]:
    """Yield checkpoints, newest first: Tune's own after an error, older ones beside it, those of earlier drivers."""
    current = tune.get_checkpoint()
    if current is not None:
        yield current
        yield from _older_siblings(current)
    for path in earlier:
        yield tune.Checkpoint(path)


def _older_siblings(checkpoint: tune.Checkpoint) -> Iterator[tune.Checkpoint]:
    folder = Path(checkpoint.path)
    if folder.is_dir():  # a bucket writes whole objects or none
        for sibling in sorted(folder.parent.glob("checkpoint_*"), reverse=True):
            if sibling.name < folder.name:
                yield tune.Checkpoint(str(sibling))


@contextmanager
def _checkpoint(trainer: Trainer, best: _Best) -> Iterator[tune.Checkpoint]:
    """Provide a checkpoint with the training's state and best weights, until Tune has copied it.

    No fsync is needed: after a crash nothing reads this folder.
    """
    with tempfile.TemporaryDirectory(prefix="nkat-") as folder:
        if best.weights is not None:
            Path(folder, WEIGHTS_FILE).write_bytes(best.weights)
        Path(folder, STATE_FILE).write_bytes(state_bytes({"trainer": trainer.state(), "best": best.score}))
        yield tune.Checkpoint(folder)
