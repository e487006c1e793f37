"""What comes before a run: the data and the folder are looked at, and everything that can be refused is refused.

Nothing here loads torch or Ray, and nothing is written but the configuration, last.
"""

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from nkat_ray.config import STAGE1_DATASET, RunConfig, field_names
from nkat_ray.data import Dataset, Missing, open_dataset, split_validation
from nkat_ray.data.selection import training_limits
from nkat_ray.domains import domain_of_json
from nkat_ray.files import CONFIG_FILE, write_atomically
from nkat_ray.metrics import STAGE2_DATASETS
from nkat_ray.report.tables import plain, read_summary
from nkat_ray.search.storage import RunStorage, check_owner, check_writable, newest_run, run_storage

Datasets = Mapping[str, Dataset | Missing]


class UsageError(ValueError):
    """Bad input: one line that names the value, the allowed range and what to do. Exit code 2."""


def saved_config(storage_path: str, name: str | None) -> tuple[RunConfig, tuple[str, ...]]:
    """Configuration and typed parameters of the run that --resume continues.

    Raises:
        UsageError: there is no such run, or it belongs to another user.
    """
    check_writable(storage_path)
    name = name or newest_run(storage_path)
    if name is None:
        raise UsageError(f"storage_path is {storage_path!r}; it holds no run to resume; start one without --resume")
    storage = run_storage(storage_path, name)
    if storage.remote is not None and storage.exists():
        storage.pull()
    path = storage.local / CONFIG_FILE
    if not path.exists():
        raise UsageError(f"name is {name!r}; {storage_path} holds no such run; `ls {storage_path}` shows what there is")
    check_owner(storage.local)
    check_owner(path)
    try:
        saved = read_summary(path, "fixed")
    except ValueError as error:
        raise UsageError(f"name is {name!r}; {error}; `ls {storage_path}` shows what there is") from error
    return config_of_json(saved, name=name, storage_path=storage_path), tuple(saved["fixed"])


def open_datasets(config: RunConfig, console: Console) -> tuple[RunConfig, dict[str, Dataset | Missing]]:
    """Find and check the datasets; without CIFAR-10 there is no Stage 1.

    Returns:
        The configuration, which says `synthetic` where generated images had to do, and the datasets in its order.

    Raises:
        ValueError: CIFAR-10 is missing, or a file is damaged.
    """

    def notice(text: str) -> None:
        console.print(f"note: {text}", style="yellow", markup=False, highlight=False)

    found: dict[str, Dataset | Missing] = {}
    # Stage 1's dataset first: without it nothing else need be looked for, and if it is generated, so are the others:
    # scores over real and generated images together would say nothing about either.
    for name in sorted(config.datasets, key=lambda name: name != STAGE1_DATASET):
        first = name == STAGE1_DATASET
        found[name] = dataset = open_dataset(
            name, config, allow_synthetic=first and config.preset == "quick", notice=notice
        )
        if first and isinstance(dataset, Missing):
            advice = "give --data_dir, or try it out with --preset quick --data synthetic"
            raise UsageError(f"{STAGE1_DATASET} cannot be had: {dataset.reason}; {advice}")
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


def config_of_json(saved: Mapping[str, Any], **replaced: Any) -> RunConfig:
    """A RunConfig from config.json, which knows neither tuples nor paths.

    Raises:
        ValueError: a value that cannot have been written by a run.
    """
    values: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in saved.items() if key in field_names(RunConfig)
    }
    folder, space = values.get("data_dir"), values.get("own_space")
    values["data_dir"] = Path(folder) if isinstance(folder, str) else folder
    if isinstance(space, Mapping):
        values["own_space"] = {name: domain_of_json(domain) for name, domain in space.items()}
    return RunConfig(**{**values, **replaced})


def write_config(
    storage: RunStorage, config: RunConfig, fixed: Collection[str], datasets: Mapping[str, Dataset | Missing]
) -> None:
    """Write config.json: what --resume starts from."""
    if config.data_dir is not None:
        config = dataclasses.replace(config, data_dir=config.data_dir.absolute())
    content = {**plain(asdict(config)), "fixed": sorted(fixed), "found": describe_data(datasets)}
    write_atomically(storage.local / CONFIG_FILE, (json.dumps(content, indent=2) + "\n").encode())
    try:
        storage.push()
    except OSError as error:
        storage.remove()
        raise UsageError(f"storage_path: {storage.remote} cannot be written ({error}); check credentials") from error


def describe_data(datasets: Mapping[str, Dataset | Missing]) -> dict[str, Any]:
    """Source, digest and number of images of each dataset; the reason where one is missing."""
    return {
        name: {"source": None, "digest": None, "images": 0, "missing": found.reason}
        if isinstance(found, Missing)
        else {"source": found.source, "digest": found.digest, "images": found.sizes, "verified": found.verified}
        for name, found in datasets.items()
    }


def refuse_other_data(saved: Mapping[str, Any], datasets: Datasets) -> dict[str, Dataset | Missing]:
    """The datasets of a run that goes on: those that it began with, by digest; what was missing then stays missing.

    Args:
        saved: `describe_data`'s, from the run's config.json.
        datasets: what is there now.

    Raises:
        UsageError: a dataset is not the one of before, or is gone.
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
            raise UsageError(
                f"{name} has digest {now}; this run began with {before['digest']} ({before['source']}); "
                "give the --data_dir of before"
            )
    return kept
