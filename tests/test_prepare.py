"""What is saved before a run starts is what a resumed run begins with."""

import json

import pytest

from nkat_ray.config import RunConfig
from nkat_ray.data import Missing, open_dataset
from nkat_ray.prepare import UsageError, config_of_json, describe_data, refuse_other_data, saved_config, write_config
from nkat_ray.search.storage import run_storage

NAMES = ("mnist", "cifar10")


def synthetic():
    run = RunConfig.from_preset("quick", data="synthetic", data_dir=None)
    return {name: open_dataset(name, run, notice=lambda _: None) for name in NAMES}


@pytest.fixture
def saved(tmp_path):
    """A run's folder with its configuration, as it is before Ray starts."""
    run = RunConfig.from_preset(
        "quick",
        name="r",
        storage_path=str(tmp_path),
        data="synthetic",
        data_dir=tmp_path,
        top_k=None,
        randaugment=(2, 9),
    )
    storage = run_storage(run.storage_path, "r")
    storage.local.mkdir()
    datasets = synthetic()
    write_config(storage, run, {"depth"}, datasets)
    return run, storage, datasets


def test_a_saved_configuration_comes_back_whole(saved):
    run, storage, _ = saved
    assert saved_config(run.storage_path, "r") == (run, ("depth",))
    assert saved_config(run.storage_path, None)[0].name == "r"
    assert config_of_json(json.loads((storage.local / "config.json").read_text())) == run


def test_the_same_data_are_accepted_and_others_refused(saved):
    _, storage, datasets = saved
    found = json.loads((storage.local / "config.json").read_text())["found"]
    assert refuse_other_data(found, datasets) == datasets
    with pytest.raises(UsageError, match="mnist has digest"):
        refuse_other_data({**found, "mnist": {**found["mnist"], "digest": "sha256:0"}}, datasets)
    with pytest.raises(UsageError, match="cifar10 has digest None"):
        refuse_other_data(found, {**datasets, "cifar10": Missing("cifar10", "gone")})


def test_what_was_missing_stays_missing(saved):
    _, _, datasets = saved
    before = describe_data({**datasets, "mnist": Missing("mnist", "no network")})
    assert refuse_other_data(before, datasets)["mnist"] == Missing("mnist", "no network")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="not a run's"):
        saved_config(str(tmp_path), "r")
