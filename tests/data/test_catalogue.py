import os

import pytest

from nkat_ray.config import DataConfig
from nkat_ray.data import DataError, dataset_table, fetch, sources, spec, verify
from nkat_ray.data.dataset import Unavailable


def states(rows):
    return {row.name: row.state for row in rows}


def test_table_of_a_folder(tmp_path, write_pair, write_file):
    place = write_pair(tmp_path / "own", "pets")
    write_pair(place, "mnist", shape="8,8")
    write_file(place / "torn-test.parquet")
    raw = place / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"")
    rows = dataset_table(DataConfig(data_dir=place))
    assert states(rows) == {
        "mnist": "present",
        "fashion_mnist": "present",
        "emnist_letters": "missing",
        "cifar10": "missing",
        "pets": "present",
        "torn": "damaged",
    }
    pets = next(row for row in rows if row.name == "pets")
    assert (pets.classes, pets.train, pets.test, pets.digest) == (2, 20, 10, None)
    assert "a test" in pets.where


def test_table_of_an_empty_cache(own_cache):
    assert set(states(dataset_table(DataConfig(data_dir=None))).values()) == {"missing"}
    assert not own_cache.exists()


def test_verify_checks_again(tmp_path, write_pair, monkeypatch):
    place = write_pair(tmp_path / "own", "pets")
    config = DataConfig(data_dir=place)
    assert states(verify(config)) == {"pets": "unverified"}
    (row,) = verify(config, ["pets"])
    assert row.digest.startswith("sha256:")
    path = place / "pets-train.parquet"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[40:60] = bytes(20)
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if nothing had happened
    (changed,) = verify(config, ["pets"])
    assert changed.digest != row.digest
    assert states(verify(config, ["plants"])) == {"plants": "missing"}


def test_fetch(monkeypatch):
    def offline(*_, **__):
        raise Unavailable("offline")

    monkeypatch.setattr(sources, "FETCHERS", (offline,))
    rows = fetch(notice=lambda _: None)
    assert states(rows) == dict.fromkeys(spec.KNOWN, "missing")
    assert rows[0].where == "offline"
    with pytest.raises(DataError, match="dataset name"):
        fetch(["../x"], notice=lambda _: None)


def test_no_folder(tmp_path):
    for function in (dataset_table, verify):
        with pytest.raises(DataError, match="does not exist"):
            function(DataConfig(data_dir=tmp_path / "none"))


def test_layouts_of_other_people(tmp_path, write_shards, paint):
    place = tmp_path / "own"
    for split in ("train", "test"):
        write_shards(place / "CIFAR-10" / "plain_text", split, n=20, names=spec.KNOWN["cifar10"].class_names, shards=2)
        write_shards(place / "letters", split, n=8, names=("a", "b"))
        for name in ("cat", "dog"):
            paint(place / "pets" / split / name / "1.png", (len(split), len(name), 9))
    (place / "letters" / "train-00000-of-00001.parquet").write_bytes(b"torn")
    (place / "runs" / "old").mkdir(parents=True)
    rows = {row.name: row for row in dataset_table(DataConfig(data_dir=place))}
    assert (rows["cifar10"].state, rows["cifar10"].classes, rows["cifar10"].train) == ("present", 10, 20)
    assert (rows["pets"].state, rows["pets"].train, rows["pets"].test) == ("present", 2, 2)
    assert rows["letters"].state == "damaged"
    assert set(rows) == {*spec.KNOWN, "letters", "pets"}
    assert states(verify(DataConfig(data_dir=place))) == {
        "cifar10": "unverified",
        "letters": "damaged",
        "pets": "unverified",
    }


def test_a_folder_that_is_one_dataset(tmp_path, write_shards):
    for split in ("train", "test"):
        write_shards(tmp_path / "my leaves", split, names=("oak", "maple"))
        write_shards(tmp_path / "copy", split, n=20, names=spec.KNOWN["cifar10"].class_names)
    rows = dataset_table(DataConfig(data_dir=tmp_path / "my leaves"))
    assert {row.name for row in rows if row.state != "missing"} == {"my_leaves"}
    assert states(verify(DataConfig(data_dir=tmp_path / "my leaves"))) == {"my_leaves": "unverified"}
    rows = dataset_table(DataConfig(data_dir=tmp_path / "copy"))
    assert {row.name for row in rows if row.state != "missing"} == {"cifar10"}


def test_verify_of_nothing(tmp_path, own_cache):
    with pytest.raises(DataError, match="nothing to verify; expected: Parquet files, class folders"):
        verify(DataConfig(data_dir=tmp_path))
    with pytest.raises(DataError, match="nothing to verify; `nkat data fetch`"):
        verify(DataConfig(data_dir=None))
    assert not own_cache.exists()
