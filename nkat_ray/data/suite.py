"""Find, check and describe the datasets of one run, and compare them with those of an earlier start."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from nkat_ray.config import STAGE1_DATASET, DataConfig, RunConfig
from nkat_ray.data import Dataset, Missing, open_dataset, split_validation
from nkat_ray.data.selection import training_limits
from nkat_ray.data.spec import KNOWN
from nkat_ray.errors import UserError, suggestion
from nkat_ray.metrics import STAGE2_DATASETS

Datasets = Mapping[str, Dataset | Missing]


def open_datasets(config: RunConfig, console: Console) -> tuple[RunConfig, dict[str, Dataset | Missing]]:
    """Find and check the datasets of a run.

    Returns:
        The configuration (with `data` "synthetic" if the images are generated), and the datasets in its order.

    Raises:
        UserError: CIFAR-10 or a dataset of the user's own is missing, or a file is damaged.
    """

    def notice(text: str) -> None:
        console.print(f"note: {text}", style="yellow", markup=False, highlight=False)

    for name in (name for name in config.datasets if name not in KNOWN):  # finds a misspelt name before a download
        own = open_dataset(name, config, notice=notice)
        if isinstance(own, Missing):
            raise UserError(f"datasets has {name!r}; {own.reason}{suggestion(name, KNOWN)}")
    found: dict[str, Dataset | Missing] = {}
    # Stage 1's dataset comes first: without it the others are not needed. If it is generated, the others are too, since
    # scores over both real and generated images would mean nothing.
    for name in sorted(config.datasets, key=lambda name: name != STAGE1_DATASET):
        first = name == STAGE1_DATASET
        found[name] = dataset = open_dataset(
            name, config, allow_synthetic=first and config.preset == "quick", notice=notice
        )
        if first and isinstance(dataset, Missing):
            advice = "give --data_dir, or try it out with --preset quick --data synthetic"
            raise UserError(f"{STAGE1_DATASET} is missing: {dataset.reason}; {advice}")
        if first and isinstance(dataset, Dataset) and dataset.source.startswith("synthetic"):
            config = dataclasses.replace(config, data="synthetic")
    for name, dataset in found.items():
        if isinstance(dataset, Missing):
            effect = " and lowers Robustness" if name in STAGE2_DATASETS else ""
            notice(f"{name} is missing{effect}: {dataset.reason}")
        else:
            limits = training_limits(dataset, config)
            split_validation(dataset.labels("train"), val_images=limits.val_images, train_images=limits.train_images)
    return config, {name: found[name] for name in config.datasets}


def need_dataset(name: str, config: DataConfig, console: Console, *, advice: str) -> Dataset:
    """Find and check a dataset; refuse (UserError) one that is missing, with some advice."""
    found = open_dataset(name, config, notice=lambda text: console.print(f"note: {text}", markup=False))
    if isinstance(found, Missing):
        raise UserError(f"dataset {name!r} is missing: {found.reason}; {advice}")
    return found


def describe_data(datasets: Mapping[str, Dataset | Missing]) -> dict[str, Any]:
    """Describe each dataset for a run's record: source, digest and number of images, or why it is missing."""
    return {
        name: {"source": None, "digest": None, "images": 0, "missing": found.reason}
        if isinstance(found, Missing)
        else {"source": found.source, "digest": found.digest, "images": found.sizes, "verified": found.verified}
        for name, found in datasets.items()
    }


def refuse_other_data(saved: Mapping[str, Any], datasets: Datasets) -> dict[str, Dataset | Missing]:
    """Refuse to continue a run with other datasets than at its start; a dataset that was missing remains missing.

    Args:
        saved: result of `describe_data` at the start, from the run's config.json.

    Returns:
        The datasets of the run.

    Raises:
        UserError: a dataset has another digest, or is missing now.
    """
    kept: dict[str, Dataset | Missing] = {}
    for name, found in datasets.items():
        before = saved[name]
        now = None if isinstance(found, Missing) else found.digest
        if before["digest"] is None:
            kept[name] = Missing(name, before["missing"])
        elif now == before["digest"]:
            kept[name] = found
        else:
            raise UserError(
                f"{name} has digest {now}; this run was started with {before['digest']} ({before['source']}); "
                "give the same --data_dir as then"
            )
    return kept
