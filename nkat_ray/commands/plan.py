"""`--dry_run`: print what a run would do and cost, without starting or writing anything."""

import dataclasses
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.table import Table

from nkat_ray.cluster.resources import Cluster, Share, on_gpus, refuse_oversized, room, trial_share
from nkat_ray.config import (
    EXPECTED,
    IMAGE_SIZE,
    STAGE1_DATASET,
    ClusterConfig,
    DataConfig,
    RunConfig,
    ScreenConfig,
    TrialConfig,
    field_names,
)
from nkat_ray.cost import CHECKPOINT_BYTES, GIB, cpu_bytes, epoch_flops, least_epochs, peak_bytes, stored_parameters
from nkat_ray.data.catalogue import find_datasets
from nkat_ray.data.selection import validation_size
from nkat_ray.data.spec import KNOWN
from nkat_ray.errors import DONE, UserError, suggestion
from nkat_ray.fields import field_types
from nkat_ray.flags import typed_text
from nkat_ray.metrics import ASSUMED_ACCURACY
from nkat_ray.record.storage import existing_folder, is_uri
from nkat_ray.record.warm_start import read_earlier
from nkat_ray.report.demand import demands, stem_name
from nkat_ray.report.terminal import Screen
from nkat_ray.report.wording import spoken_time
from nkat_ray.space import SearchSpace, baseline_point, corner_configs, describe_domain, refuse_impossible, round1_point

PROBE_TOKENS: Final = 512  # per step of the probe on a CPU: speed hardly depends on more
PROBE_S: Final = 0.7
PROBE_STEPS: Final = 16  # per epoch of the probe on a GPU
PROBE_EPOCHS: Final = 3  # on a GPU, where the first one warms up
PROBE_BATCH: Final = 2048  # images at most: the probe of a batch of 65,536 would take gigabytes
PROBE_LR: Final = 1e-5  # so small that no loss leaves the finite numbers
START_S: Final = 30.0  # from the command to the first step: Ray, images, processes
SLOWER: Final = 1.6  # training time / time of the probe: augmentation, optimizer, a busy machine
MOST_NAMED: Final = 8  # largest number of searched parameters that are listed without --verbose
KEPT_CHECKPOINTS: Final = 2  # per trial that runs or passed the gate
WEIGHT_BYTES: Final = 4  # per parameter
PAGES_BYTES: Final = 8e6  # report.html, with plotly in it, and TensorBoard's pictures
TRIAL_BYTES: Final = 1e5  # curves of a trial in the journal, the tables and TensorBoard
WITHOUT_EFFECT: Final = {*field_names(DataConfig), *field_names(ClusterConfig), "storage_path", "log_to"}  # on scores
NOT_COMPARED: Final = {*field_names(ScreenConfig), "verbose", "preset", "name", "resume", "dry_run"}


def print_plan(run: RunConfig, space: SearchSpace, screen: Screen) -> int:
    """Print the plan of a run, with --verbose also the whole configuration; return exit code 0.

    Raises:
        UserError: a run with these flags would be refused.
    """
    from nkat_ray.cluster.connect import planned_cluster

    refuse_impossible(run, space.domains)
    earlier = read_earlier(run, space.domains)
    baseline, (round1, _) = baseline_point(run, space.domains), round1_point(run, space.domains)
    plan = plan_of(run, space, planned_cluster(run.address, run.gpus_per_trial))
    if earlier.notice:
        plan["warm start"] = earlier.notice.removeprefix("warm start: ")
    details = {
        "configuration": dict(typed_flag(run, name) for name in field_names(RunConfig) if _is_typed(run, name)),
        "searched": {name: describe_domain(domain) for name, domain in space.domains.items()},
        "first trials": {"trial 0 (baseline)": _point(baseline), "trial 1 (Round-1's best)": _point(round1)},
    }
    screen.print(_table(f"Plan of a run with --preset {run.preset}; nothing has been started", plan))
    if run.verbose:
        for title, rows in details.items():
            screen.print(_table(title, rows))
    document = {**details, "configuration": dataclasses.asdict(run), "plan": plan}
    screen.conclude(document, [f"{name}: {text}" for name, text in plan.items()])
    return DONE


def plan_of(run: RunConfig, space: SearchSpace, cluster: Cluster) -> dict[str, str]:
    """Return the lines of a plan, label -> text."""
    corners = corner_configs(run, space.domains)
    shares = [trial_share(config, run, cluster) for config in corners]
    refuse_oversized(shares, cluster)
    there = room(run, cluster, corners)
    at_a_time, speed = there.slots, measured_flops_per_s(typical(corners), on_gpu=on_gpus(run, cluster))
    images = run.train_images or KNOWN[STAGE1_DATASET].release.sizes["train"] - run.val_images
    names = ", ".join(space.domains) if len(space.domains) <= MOST_NAMED else f"{len(space.domains)} parameters"
    plan = {
        "trials": f"{run.num_samples} of at most {run.epochs} epochs on {images:,} images",
        "search": f"space {space.name}: {names or 'nothing, the trials differ only in their seeds'}",
        "fixed": _spoken(run, space.fixed),
        "expected": "" if set(_changed(run)) - WITHOUT_EFFECT else EXPECTED[run.preset],
        "not as preset": _spoken(run, [name for name in _changed(run) if name not in space.fixed]),
        "at a time": f"{at_a_time} on {cluster.cpus} CPU, {cluster.gpus:g} GPU; per trial {_described(shares)}",
        "": "; ".join(there.notices),
        "memory": _memory(corners, shares, cluster),
        **gate_rows(run, space),
        "Stage 1": stage1_time(run, corners, cluster=cluster, at_a_time=at_a_time, speed=speed, images=images),
        "Stage 2": stage2_time(run, corners, at_a_time=at_a_time, speed=speed),
        "disk": disk(run, corners, at_a_time=at_a_time),
        "downloads": downloads(run),
    }
    return {name: text for name, text in plan.items() if text}


def gate_rows(run: RunConfig, space: SearchSpace) -> dict[str, str]:
    """Return the accuracy on CIFAR-10 that the gate requires, by stem and width."""
    cells: dict[str, list[str]] = {}
    for demand in demands(run, space.domains, ASSUMED_ACCURACY.values()):
        widths = " or ".join(map(str, demand.widths))
        cells.setdefault(stem_name(demand.conv_stem), []).append(f"{_range(demand.gate, '.3f')} at width {widths}")
    rows = {"gate": f"Local TPE {run.gate:g} under lambda model {run.lambda_model}: CIFAR-10 accuracy of"}
    return rows | {f"  {stem}": ", ".join(found) for stem, found in cells.items()}


def stage1_time(
    run: RunConfig, configs: Sequence[TrialConfig], *, cluster: Cluster, at_a_time: int, speed: float, images: int
) -> str:
    """Estimate the time of Stage 1, from strictest early stopping to every trial trained in full.

    Args:
        run: configuration of the run.
        configs: corners of its search space, which represent its trials.
        cluster: nodes that the run uses.
        at_a_time: number of trials at a time, >= 1.
        speed: floating-point operations per second of one trial with a core or a GPU to itself.
        images: training images per epoch.
    """
    epoch_s = sum(epoch_flops(config, images) for config in configs) / len(configs) / speed
    fastest, slowest = at_a_time, min(at_a_time, cluster.gpus or at_a_time)  # trials that share a GPU share its speed
    low_s = START_S + run.num_samples / fastest * least_epochs(run) * epoch_s
    high_s = START_S + math.ceil(run.num_samples / slowest) * run.epochs * epoch_s * SLOWER
    text = f"{spoken_time(low_s)} to {spoken_time(high_s)}"
    limit_s = math.inf if run.stage1_hours is None else 3600 * run.stage1_hours
    if limit_s >= high_s:
        return text
    least, most = 100 * limit_s / high_s, min(100.0, 100 * limit_s / low_s)
    share = f"{least:.2g} to {most:.2g} %"
    return f"{spoken_time(limit_s)} at most (--stage1_hours): {share} of the {text} that all trials take"


def stage2_time(run: RunConfig, configs: Sequence[TrialConfig], *, at_a_time: int, speed: float) -> str:
    """Estimate the time of Stage 2, for one survivor and for all trials."""
    others = [KNOWN[name].release.sizes["train"] for name in run.datasets if name in KNOWN and name != STAGE1_DATASET]
    images = [min(run.transfer_images or size, size - validation_size(size, run.val_images)) for size in others]
    seen = sum(count * run.stage2_epochs(count) for count in images)
    flops = [epoch_flops(config, seen) for config in configs]
    low_s = START_S / 2 + min(flops) / speed / min(at_a_time, max(1, len(others)))
    tasks = run.num_samples * max(1, len(others))
    high_s = START_S + math.ceil(tasks / at_a_time) / max(1, len(others)) * max(flops) / speed * SLOWER
    return f"{spoken_time(low_s)} (one survivor) to {spoken_time(high_s)} (all {run.num_samples} trials pass)"


def disk(run: RunConfig, configs: Sequence[TrialConfig], *, at_a_time: int) -> str:
    """Estimate the most disk space that a run needs in its storage path; return it with the free space there."""
    checkpoints = KEPT_CHECKPOINTS * run.num_samples + at_a_time  # if all pass; one more while a trial writes it
    weights = len(run.datasets) * run.num_samples + 2  # Stage 2's, and those of best/
    per_parameter = CHECKPOINT_BYTES * checkpoints + WEIGHT_BYTES * weights
    total = per_parameter * max(map(stored_parameters, configs)) + PAGES_BYTES + TRIAL_BYTES * run.num_samples
    text = f"at most {total / 1e9:.2g} GB below {run.storage_path}"
    if is_uri(run.storage_path):
        return text
    return f"{text}; {shutil.disk_usage(existing_folder(run.storage_path)).free / 1e9:.3g} GB are free"


def downloads(run: RunConfig) -> str:
    """Return the datasets that would be downloaded, or that are missing from the data folder.

    Raises:
        UserError: a file is damaged, or a dataset of the user's own is missing.
    """
    rows = find_datasets(run, run.datasets)
    missing = [row.name for row in rows if row.state == "missing" or (row.state == "damaged" and run.data_dir is None)]
    for row in rows:
        if row.name not in KNOWN and row.name in missing:
            raise UserError(f"datasets has {row.name!r}; {row.where}{suggestion(row.name, KNOWN)}")
        if row.state == "damaged" and row.name not in missing:
            raise UserError(row.where)
    if run.data == "synthetic":
        return "none: all images are generated"
    if run.data_dir is None:
        return f"{', '.join(missing)} (once; then kept in the cache)" if missing else "none: all are in the cache"
    effect = "the run would be refused" if STAGE1_DATASET in missing else "Robustness is lower without them"
    return f"none; missing in {run.data_dir}: {', '.join(missing)} ({effect})" if missing else "none"


def typical(configs: Sequence[TrialConfig]) -> TrialConfig:
    """Return the configuration whose cost is nearest to the mean: a GPU computes small networks far below its speed."""
    mean = sum(epoch_flops(config, 1) for config in configs) / len(configs)
    return min(configs, key=lambda config: abs(epoch_flops(config, 1) - mean))


def measured_flops_per_s(config: TrialConfig, *, on_gpu: bool) -> float:
    """Measure this machine's speed: forward and backward passes on one core, or some epochs of a training on a GPU.

    A GPU's speed depends on batch, precision and launches, so there it is measured with a training's own steps.

    Returns:
        Floating-point operations per second, as `epoch_flops` counts them.

    Raises:
        UserError: another process uses the GPU.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _gpu_flops_per_s(config) if on_gpu else _core_flops_per_s(config)
    except RuntimeError as error:
        if not on_gpu:
            raise
        advice = "try again when no other process uses it, or plan with --gpus_per_trial 0"
        said = next(iter(str(error).splitlines()), type(error).__name__)  # CUDA's advice follows its error
        raise UserError(f"the GPU's speed could not be measured ({said}); {advice}") from error
    finally:
        torch.set_num_threads(threads)


def _core_flops_per_s(config: TrialConfig) -> float:
    import torch

    from nkat_ray.model import create_nkat_vit

    model = create_nkat_vit(config, num_classes=10)
    images = torch.rand(max(1, PROBE_TOKENS // config.tokens), 3, IMAGE_SIZE, IMAGE_SIZE)
    model(images[:1])  # warms up
    steps, clock = 0, time.perf_counter()
    while time.perf_counter() - clock < PROBE_S:
        model(images).square().mean().backward()
        steps += 1
    return epoch_flops(config, len(images) * steps) / (time.perf_counter() - clock)


def _gpu_flops_per_s(config: TrialConfig) -> float:
    import numpy as np
    import torch

    from nkat_ray.data.dataset import Traits
    from nkat_ray.data.selection import Selection
    from nkat_ray.train.session import create_trainer, training_data

    recipe = dataclasses.replace(
        config, epochs=PROBE_EPOCHS, warmup=0, lr=PROBE_LR, batch_size=min(config.batch_size, PROBE_BATCH)
    )
    images = np.zeros((PROBE_STEPS * recipe.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    labels, every = np.zeros(len(images), np.int64), np.arange(len(images))
    traits = Traits(name="probe", num_classes=10, grey=False, flip=True)
    data = training_data(Selection(images, labels, every, every[:1]), traits, torch.device("cuda"))
    *_, last = create_trainer(recipe, data, seed=0, notice=lambda _: None).epochs()
    return epoch_flops(config, 1) * last.images_per_s


def _memory(configs: Sequence[TrialConfig], shares: Sequence[Share], cluster: Cluster) -> str:
    """Return the memory per trial for each share of a GPU, and the memory that is there."""
    by_share: dict[float, list[float]] = {}
    for config, share in zip(configs, shares, strict=True):
        by_share.setdefault(share.gpus, []).append((peak_bytes if share.gpus else cpu_bytes)(config) / GIB)
    parts = [f"{_range(needs, '.2g')} GiB{f' with {gpus:g} GPU' if gpus else ''}" for gpus, needs in by_share.items()]
    there = [f"{gpu.memory_bytes / GIB:.1f} GiB per GPU {gpu.kind}".strip() for gpu in cluster.kinds.values()]
    there = there or [f"{node.memory_bytes / GIB:.1f} GiB here" for node in cluster.nodes[:1] if node.memory_bytes]
    return f"{', '.join(parts)} per trial; {', '.join(there) or 'unknown here'}"


def _described(shares: Sequence[Share]) -> str:
    texts = {f"{share.cpus} CPU" + (f" + {share.gpus:g} GPU" if share.gpus else "") for share in shares}
    return " or ".join(sorted(texts))


def _range(values: Sequence[float], digits: str) -> str:
    low, high = format(min(values), digits), format(max(values), digits)
    return low if low == high else f"{low} to {high}"


def typed_flag(run: RunConfig, name: str) -> tuple[str, str]:
    """Return the flag and the words that set a field to its value."""
    value = getattr(run, name)
    if isinstance(value, bool):
        return f"--{'' if value else 'no_'}{name}", ""
    return f"--{name}", typed_text(value, field_types(RunConfig)[name].none_word or "")


def _is_typed(run: RunConfig, name: str) -> bool:
    """Return whether a field's value can be typed: None can only if the field has a word for it."""
    return getattr(run, name) is not None or field_types(RunConfig)[name].none_word is not None


def _changed(run: RunConfig) -> list[str]:
    """Return the fields that differ from the run's preset."""
    preset = RunConfig.from_preset(run.preset)
    names = [name for name in field_names(RunConfig) if name not in NOT_COMPARED]
    return [name for name in names if getattr(run, name) != getattr(preset, name)]


def _spoken(run: RunConfig, names: Sequence[str]) -> str:
    return ", ".join(" ".join(typed_flag(run, name)).strip().removeprefix("--") for name in names)


def _point(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {typed_text(value)}" for name, value in point.items())


def _table(title: str, rows: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, value)
    return table
