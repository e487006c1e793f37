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


def test_verify_checks_anew(tmp_path, write_pair, monkeypatch):
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
