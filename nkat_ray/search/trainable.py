"""A trial as Ray Tune runs it: a thin adapter between `train.loop` and Tune's reports and checkpoints."""

import math
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.actor import ActorHandle

from nkat_ray.config import RunConfig, TrialConfig
from nkat_ray.data.selection import Selection
from nkat_ray.files import WEIGHTS_FILE, write_atomically
from nkat_ray.metrics import BEST_LOCAL_TPE, LAMBDA_THEORY, LOCAL_TPE, NOTICES, lambda_theory, tpe_score
from nkat_ray.model import count_nkat_parameters, count_parameters, create_nkat_vit
from nkat_ray.search.resources import CPU_MEMORY_FRACTION, GPU_OVERHEAD_BYTES, cpu_micro_batch, peak_bytes
from nkat_ray.search.space import trial_config
from nkat_ray.search.vault import deposit
from nkat_ray.train.checkpoint import first_whole_state, save_state
from nkat_ray.train.device import device_for
from nkat_ray.train.loop import EpochResult, ImageSet, Trainer


@dataclass(frozen=True, kw_only=True)
class Stage1Data:
    """CIFAR-10's training images as every trial sees them: one copy a node, in the object store."""

    name: str
    selection: Selection
    num_classes: int
    grey: bool
    flip: bool


def gpu_memory_warning(config: TrialConfig, gpus: float) -> str | None:
    """What the GPU itself says of a trial's share: one line where the trial may not fit, None where all is well."""
    free, total = torch.cuda.mem_get_info()
    share, needed = int(min(1.0, gpus) * total), peak_bytes(config) + GPU_OVERHEAD_BYTES
    if needed > min(share, free):
        return (
            f"about {needed / 2**30:.1f} GiB of GPU memory are needed; its share is {share / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free: batches are split where they do not fit"
        )
    return None


def train_trial(
    params: Mapping[str, Any],
    *,
    run: RunConfig,
    data: Stage1Data,
    vault: ActorHandle[Any],
    deadline_s: float,
    memory_bytes: int,
) -> None:
    """Train one trial, reporting every epoch; a report has a checkpoint every `checkpoint_epochs` epochs, at the last
    epoch, and whenever a survivor got better.

    Args:
        params: the proposed values, with `trial`, `seed`, and `resume_from` (checkpoints of an earlier driver, newest
            first).
        run: the run's configuration.
        data: CIFAR-10.
        vault: takes the weights of a trial that has passed the gate.
        deadline_s: time since 1970 after which the trial returns.
        memory_bytes: memory this trial may use on a CPU.
    """
    resources = tune.get_context().get_trial_resources().required_resources
    cpus, gpus = int(resources.get("CPU", 1)), resources.get("GPU", 0.0)
    device = device_for(gpus, cpus)
    notices: list[str] = []
    if device.type == "cuda" and (warning := gpu_memory_warning(trial_config(run, params), gpus)):
        notices.append(warning)
    trainer = _trainer(params, run=run, data=data, device=device, deadline_s=deadline_s, notice=notices.append)
    if device.type == "cpu":
        trainer.micro_batch = cpu_micro_batch(trainer.config, memory_bytes=memory_bytes)
    counts = {"nkat_parameters": count_nkat_parameters(trainer.model), "parameters": count_parameters(trainer.model)}
    stem, width = trainer.config.conv_stem, trainer.config.embed_dim
    lam = lambda_theory(run.lambda_model, conv_stem=stem, embed_dim=width, **counts)
    best, weights = _continue(trainer, params)
    if params["resume_from"] and trainer.epoch == 0:
        notices.append("none of its checkpoints is whole any more: it begins again")
    facts = {"node": socket.gethostname(), "gpus": gpus, "cpus": cpus, LAMBDA_THEORY: lam, **counts}
    for result in trainer.epochs():
        score, better = _score(result, lam), False
        if score > best:  # False for NaN
            best, better = score, True
            weights = trainer.weights(
                dataset=data.name, grey=data.grey, val_accuracy=result.val_accuracy, seed=params["seed"]
            ).to_bytes()
            if best >= run.gate and not deposit(vault, params["trial"], best, weights):
                notices.append("the vault is gone: the weights are kept on disk alone")
        row = {**asdict(result), LOCAL_TPE: score, BEST_LOCAL_TPE: best if best > -math.inf else math.nan, **facts}
        if math.isfinite(score):
            row |= trainer.attention_entropy()
            row |= trainer.nkat_scalars()
        due = result.epoch % run.checkpoint_epochs == 0 or result.epoch == run.epochs
        kept = math.isfinite(score) and (due or (better and best >= run.gate))
        with _checkpoint(trainer, best, weights, kept=kept) as checkpoint:
            tune.report({**row, NOTICES: list(notices)}, checkpoint=checkpoint)
        notices.clear()


def _trainer(
    params: Mapping[str, Any],
    *,
    run: RunConfig,
    data: Stage1Data,
    device: torch.device,
    deadline_s: float,
    notice: Callable[[str], None],
) -> Trainer:
    config = trial_config(run, params)
    torch.manual_seed(params["seed"])  # the process served another trial before
    images, labels = data.selection.images, data.selection.labels
    train = ImageSet(images, labels, data.selection.train_index, device)
    mean, std = train.statistics()
    model = create_nkat_vit(config, num_classes=data.num_classes, grey=data.grey, mean=mean, std=std)
    return Trainer(
        model, config, train=train, val=ImageSet(images, labels, data.selection.val_index, device),
        num_classes=data.num_classes, flip=data.flip, mean=mean, std=std, seed=params["seed"], device=device,
        notice=notice, deadline_s=deadline_s,
    )  # fmt: skip


def _score(result: EpochResult, lam: float) -> float:
    return tpe_score(result.val_accuracy, lam) if math.isfinite(result.val_accuracy) else math.nan


def _continue(trainer: Trainer, params: Mapping[str, Any]) -> tuple[float, bytes | None]:
    """Load the newest whole checkpoint, of this driver or an earlier one: best Local TPE and weights so far."""
    with ExitStack() as stack:
        folders = (Path(stack.enter_context(c.as_directory())) for c in _checkpoints(params["resume_from"]))
        found = first_whole_state(folders)
        if found is None:
            return -math.inf, None
        folder, state = found
        trainer.load_state(state["trainer"])
        weights = folder / WEIGHTS_FILE
        return state["best"], weights.read_bytes() if weights.exists() else None


def _checkpoints(earlier: list[str]) -> Iterator[tune.Checkpoint]:
    """Newest first: the one Tune hands over after a fault and its elder siblings, then those of an earlier driver."""
    current = tune.get_checkpoint()
    if current is not None:
        yield current
        yield from _elder_siblings(current)
    for path in earlier:
        yield tune.Checkpoint(path)


def _elder_siblings(checkpoint: tune.Checkpoint) -> Iterator[tune.Checkpoint]:
    folder = Path(checkpoint.path)
    if folder.is_dir():  # a bucket writes whole objects or none
        for sibling in sorted(folder.parent.glob("checkpoint_*"), reverse=True):
            if sibling.name < folder.name:
                yield tune.Checkpoint(str(sibling))


@contextmanager
def _checkpoint(
    trainer: Trainer, best: float, weights: bytes | None, *, kept: bool
) -> Iterator[tune.Checkpoint | None]:
    """A folder with the training's state and best weights, until Tune has stored it.

    None unless `kept`. An epoch whose loss was not finite never is: the last finite state stays.
    """
    if not kept:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="nkat-") as folder:
        if weights is not None:
            write_atomically(Path(folder) / WEIGHTS_FILE, weights)
        save_state(Path(folder), {"trainer": trainer.state(), "best": best})
        yield tune.Checkpoint(folder)


def memory_for_trial(node_memory_bytes: int, slots_a_node: int) -> int:
    """Memory that each of the trials on a node may plan with."""
    return int(node_memory_bytes * CPU_MEMORY_FRACTION / max(1, slots_a_node))
