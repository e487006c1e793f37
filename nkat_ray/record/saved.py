"""Write a run's config.json, and read it when the run is resumed."""

import dataclasses
import json
from dataclasses import asdict
from typing import Final

from nkat_ray.config import RunConfig, config_of_json
from nkat_ray.data.suite import Datasets, describe_data
from nkat_ray.errors import UserError
from nkat_ray.files import CONFIG_FILE, write_atomically
from nkat_ray.record.storage import RunStorage, check_owner, check_writable, newest_run, run_storage
from nkat_ray.record.tables import plain, read_summary
from nkat_ray.space import SearchSpace, space_of_json

# Settings of version 0.1.0 that were removed -> the only value with which a run can still be resumed.
REMOVED: Final = {"objective": "local_tpe", "gate_projection": False, "smoke_epoch": 10, "smoke_accuracy": 0.45}


def saved_config(storage_path: str, name: str | None) -> tuple[RunConfig, SearchSpace]:
    """Read configuration and search space of the run that --resume continues.

    Raises:
        UserError: there is no such run, it belongs to another user, or it uses a removed setting.
    """
    check_writable(storage_path)
    name = name or newest_run(storage_path)
    if name is None:
        raise UserError(f"storage_path is {storage_path!r}; it contains no run to resume; start one without --resume")
    storage = run_storage(storage_path, name)
    storage.pull()
    path = storage.local / CONFIG_FILE
    if not path.exists():
        raise UserError(f"name is {name!r}; {storage_path} holds no such run; `ls {storage_path}` shows what there is")
    check_owner(storage.local)
    check_owner(path)
    try:
        saved = read_summary(path, "fixed")
    except UserError as error:
        raise UserError(f"name is {name!r}; {error}; `ls {storage_path}` shows what there is") from error
    gone = [f"{key} {saved[key]}" for key, default in REMOVED.items() if saved.get(key, default) != default]
    if gone:
        raise UserError(
            f"name is {name!r}; it was started with {', '.join(gone)}, which this version no longer has; "
            "resume it with the version that started it"
        )
    return config_of_json(RunConfig, saved, name=name, storage_path=storage_path), space_of_json(saved)


def write_config(storage: RunStorage, config: RunConfig, space: SearchSpace, datasets: Datasets) -> None:
    """Write config.json, which --resume reads, into the run's folder and its bucket.

    Raises:
        UserError: the bucket cannot be written.
    """
    if config.data_dir is not None:
        config = dataclasses.replace(config, data_dir=config.data_dir.absolute())
    content = {**plain(asdict(config)), **space.to_json(), "found": describe_data(datasets)}
    write_atomically(storage.local / CONFIG_FILE, (json.dumps(content, indent=2) + "\n").encode())
    try:
        storage.push()
    except OSError as error:
        raise UserError(f"storage_path: {storage.remote} cannot be written ({error}); check credentials") from error
