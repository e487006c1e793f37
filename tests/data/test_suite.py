"""What is saved before a run starts is what a resumed run begins with."""

import json

import pytest
from rich.console import Console

from nkat_ray.config import RunConfig, config_of_json
from nkat_ray.data import Missing, open_dataset
from nkat_ray.data.suite import describe_data, open_datasets, refuse_other_data
from nkat_ray.errors import UserError
from nkat_ray.record.saved import saved_config, write_config
from nkat_ray.record.storage import run_storage
from nkat_ray.space import space_of

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
    write_config(storage, run, space_of(run, {"depth"}), datasets)
    return run, storage, datasets


def test_a_saved_configuration_comes_back_whole(saved):
    run, storage, _ = saved
    assert saved_config(run.storage_path, "r") == (run, space_of(run, {"depth"}))
    assert saved_config(run.storage_path, None)[0].name == "r"
    assert config_of_json(RunConfig, json.loads((storage.local / "config.json").read_text())) == run


def test_the_same_data_are_accepted_and_others_refused(saved):
    _, storage, datasets = saved
    found = json.loads((storage.local / "config.json").read_text())["found"]
    assert refuse_other_data(found, datasets) == datasets
    with pytest.raises(UserError, match="mnist has digest"):
        refuse_other_data({**found, "mnist": {**found["mnist"], "digest": "sha256:0"}}, datasets)
    with pytest.raises(UserError, match="cifar10 has digest None"):
        refuse_other_data(found, {**datasets, "cifar10": Missing("cifar10", "gone")})


def test_what_was_missing_stays_missing(saved):
    _, _, datasets = saved
    before = describe_data({**datasets, "mnist": Missing("mnist", "no network")})
    assert refuse_other_data(before, datasets)["mnist"] == Missing("mnist", "no network")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not a run's"):
        saved_config(str(tmp_path), "r")


# Reported in embeddings-benchmark/mteb#17, stanford-crfm/helm#289
@pytest.mark.parametrize("place", [{"data": "synthetic"}, {"data_dir": "."}, {}])
def test_a_misspelt_dataset_is_refused_before_anything_is_fetched(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("nkat_ray.data.sources._fetch", lambda *_: pytest.fail("a dataset was fetched"))
    place = {"data_dir": None, **place, **({"data_dir": tmp_path} if "data_dir" in place else {})}
    config = RunConfig.from_preset("quick", datasets=("cifar10", "mnsit"), **place)
    with pytest.raises(UserError, match=r"^datasets has 'mnsit'; .*did you mean mnist\?$"):
        open_datasets(config, Console())


@pytest.mark.parametrize(
    ("key", "value", "refused"), [("objective", "local_tpe,lambda", True), ("smoke_epoch", 10, False)]
)
def test_a_run_with_a_removed_setting_is_refused(saved, key, value, refused):
    run, storage, _ = saved
    path = storage.local / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    if not refused:
        assert saved_config(run.storage_path, "r")[0] == run
        return
    with pytest.raises(UserError, match=f"started with {key} {value}, which this version no longer has"):
        saved_config(run.storage_path, "r")
