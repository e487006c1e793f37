import json
import tempfile
import threading
import time

import pytest

from nkat_ray.data import cache
from nkat_ray.data.cache import Check, Memory, cache_folder, fetch_lock
from nkat_ray.data.dataset import Unavailable
from nkat_ray.errors import UserError

CHECK = Check({"train": "a" * 64, "test": "b" * 64}, {"train": 3, "test": 2}, (1, 28, 28), {"x": "c" * 64})


def test_memory_of_one_file(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_text("one")
    memory = Memory(tmp_path / "cache")
    assert memory.recall([path]) is None
    memory.remember([path], CHECK)
    assert Memory(tmp_path / "cache").recall([path]) == CHECK
    assert Memory(tmp_path / "cache", fresh=True).recall([path]) is None
    path.write_text("longer")
    assert memory.recall([path]) is None
    memory.remember([path], CHECK)
    entries = json.loads((tmp_path / "cache" / "checked.json").read_text())
    assert len(entries) == 1  # what is known of the old content is dropped


def test_memory_of_several_files(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    for path in files:
        path.write_text("one")
    memory = Memory(tmp_path / "cache")
    memory.remember(files, CHECK)
    assert memory.recall(files) == CHECK
    assert memory.recall(files[:1]) is None
    files[1].write_text("longer")
    assert memory.recall(files) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 99_999])
def test_damaged_memory_is_no_memory(tmp_path, text):
    path = tmp_path / "x.parquet"
    path.write_text("one")
    (tmp_path / "checked.json").write_text(text)
    memory = Memory(tmp_path)
    assert memory.recall([path]) is None
    memory.remember([path], CHECK)
    assert memory.recall([path]) == CHECK


def test_entry_of_another_version(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_text("one")
    memory = Memory(tmp_path)
    memory.remember([path], CHECK)
    entries = json.loads((tmp_path / "checked.json").read_text())
    (tmp_path / "checked.json").write_text(json.dumps({key: {"other": 1} for key in entries}))
    assert memory.recall([path]) is None


# Reported in open-mmlab/mim#240, h2oai/h2ogpt#729
def test_a_cache_that_cannot_be_written_is_tolerated(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_text("one")
    (tmp_path / "cache").write_text("a file in its place")
    memory = Memory(tmp_path / "cache")
    memory.remember([path], CHECK)
    assert memory.recall([path]) is None


def test_lock_lets_one_in_at_a_time(tmp_path):
    inside, most = [0], [0]

    def work():
        with fetch_lock(tmp_path, "mnist"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.05)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_lock_in_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(Unavailable, match="cannot be written"), fetch_lock(tmp_path / "cache", "mnist"):
        pass


def test_cache_folder_follows_the_environment(own_cache):
    assert cache_folder() == own_cache


# Reported in h2oai/h2o-llmstudio#974
def test_a_user_without_a_home_has_a_private_cache_below_the_temporary_folder(tmp_path, monkeypatch):
    def nobody(_):
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = cache.user_cache()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache.cache_folder() == folder / "data"
    monkeypatch.setattr(cache, "is_own", lambda _: False)
    with pytest.raises(UserError, match="belongs to another user; set XDG_CACHE_HOME"):
        cache.user_cache()
