import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from nkat_ray.files import CONFIG_FILE
from nkat_ray.record.storage import (
    LOCK_FILE,
    RunHeld,
    RunStorage,
    check_owner,
    check_writable,
    is_uri,
    newest_run,
    run_storage,
)

HOLD = """
import sys
from filelock import FileLock
held = FileLock(sys.argv[1]).acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bucket(tmp_path: Path, cache: Path) -> str:
    """A storage path that is a URI, as a bucket's is."""
    return f"file://{tmp_path}/bucket"


def begin(storage_path: Path, name: str, *, age_s: float = 0) -> None:
    folder = storage_path / name
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text("{}")
    then = (folder / CONFIG_FILE).stat().st_mtime - age_s
    os.utime(folder / CONFIG_FILE, (then, then))


# --- where a run lives ------------------------------------------------------------------------------------------------


def test_a_folder_is_its_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run_storage("./runs", "one")
    assert found == RunStorage(tmp_path / "runs" / "one", None)
    assert found.tune_folder == str(tmp_path / "runs" / "one" / "tune")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_storage("~/runs", "one").local == tmp_path / "runs" / "one"


def test_a_uri_has_a_local_mirror_and_tune_writes_to_the_uri(cache: Path) -> None:
    found = run_storage("s3://bucket/runs/", "one")
    assert found.local.parent == cache / "nkat-ray" / "runs"
    assert found.local.name.startswith("one-")
    assert found.local != run_storage("s3://other/runs", "one").local  # two buckets, two runs
    assert found.remote == "s3://bucket/runs/one"
    assert found.tune_folder == "s3://bucket/runs/one/tune"


@pytest.mark.parametrize(
    ("path", "expected"),
    [("./runs", False), ("/a/b:c", False), ("s3://b", True), ("file:///tmp", True), ("gs://b/c", True)],
)
def test_is_uri(path: str, expected: bool) -> None:
    assert is_uri(path) is expected


def test_a_run_exists_once_something_but_the_lock_is_there(tmp_path: Path) -> None:
    run = run_storage(str(tmp_path), "one")
    assert not run.exists()
    with run.lock():
        assert not run.exists()
        (run.local / CONFIG_FILE).write_text("{}")
        assert run.exists()


# --- buckets ----------------------------------------------------------------------------------------------------------


def test_what_is_pushed_can_be_pulled_elsewhere(bucket: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_storage(bucket, "one")
    assert not run.exists()
    files = {CONFIG_FILE: b"{}", "journal.jsonl": b"\x00\xff" * 1000, "tensorboard/trial_0/events": b"e", "empty": b""}
    for name, content in files.items():
        (run.local / name).parent.mkdir(parents=True, exist_ok=True)
        (run.local / name).write_bytes(content)
    run.push()
    assert run.exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "another machine"))
    again = run_storage(bucket, "one")
    assert again.local != run.local
    again.pull()
    found = {str(p.relative_to(again.local)): p.read_bytes() for p in again.local.rglob("*") if p.is_file()}
    found.pop(LOCK_FILE)  # this machine's own
    assert found == files


def test_only_what_has_changed_is_pushed_again(bucket: str, tmp_path: Path) -> None:
    run = run_storage(bucket, "one")
    run.local.mkdir(parents=True)
    (run.local / "journal.jsonl").write_text("first")
    run.push()
    (tmp_path / "bucket" / "one" / "journal.jsonl").unlink()
    run.push()
    assert not (tmp_path / "bucket" / "one" / "journal.jsonl").exists()
    (run.local / "journal.jsonl").write_text("first and second")
    run.push()
    assert (tmp_path / "bucket" / "one" / "journal.jsonl").read_text() == "first and second"


def test_a_local_journal_that_goes_further_is_kept(bucket: str) -> None:
    run = run_storage(bucket, "one")
    run.local.mkdir(parents=True)
    (run.local / "journal.jsonl").write_text("pushed\n")
    (run.local / CONFIG_FILE).write_text("{}")
    run.push()
    (run.local / "journal.jsonl").write_text("pushed\nand then the driver was killed\n")
    run_storage(bucket, "one").pull()
    assert "killed" in (run.local / "journal.jsonl").read_text()


def test_a_pull_leaves_a_live_driver_alone(bucket: str, tmp_path: Path) -> None:
    begin(tmp_path / "bucket", "one")
    run = run_storage(bucket, "one")
    with run.lock(), pytest.raises(RunHeld):
        run_storage(bucket, "one").pull()


def test_a_push_overwrites_and_a_pull_too(bucket: str) -> None:
    run = run_storage(bucket, "one")
    run.local.mkdir(parents=True)
    for content in ("first, and longer", "second"):
        (run.local / CONFIG_FILE).write_text(content)
        run.push()
    (run.local / CONFIG_FILE).write_text("something else")
    run.pull()
    assert (run.local / CONFIG_FILE).read_text() == "second"


def test_checkpoints_are_not_pulled(bucket: str, tmp_path: Path) -> None:
    run = run_storage(bucket, "one")
    for name in ("tune/attempt_001/checkpoint", "journal.jsonl", CONFIG_FILE):
        (tmp_path / "bucket" / "one" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bucket" / "one" / name).write_text("x")
    run.pull()
    assert {p.name for p in run.local.iterdir()} == {"journal.jsonl", CONFIG_FILE, LOCK_FILE}


def test_a_folder_is_neither_pushed_nor_pulled(tmp_path: Path) -> None:
    run = run_storage(str(tmp_path), "one")
    run.push()
    run.pull()
    assert not run.local.exists()


# --- which run --------------------------------------------------------------------------------------------------------


def test_the_newest_run_is_the_one_begun_last(tmp_path: Path) -> None:
    assert newest_run(str(tmp_path)) is None
    assert newest_run(str(tmp_path / "missing")) is None
    begin(tmp_path, "b-old", age_s=200)
    begin(tmp_path, "a-new", age_s=100)
    (tmp_path / "c-never-begun").mkdir()
    (tmp_path / "c-never-begun" / LOCK_FILE).touch()
    assert newest_run(str(tmp_path)) == "a-new"


def test_the_newest_run_of_a_bucket(bucket: str, tmp_path: Path) -> None:
    assert newest_run(bucket) is None
    begin(tmp_path / "bucket", "b-old", age_s=200)
    begin(tmp_path / "bucket", "a-new", age_s=100)
    assert newest_run(bucket) == "a-new"


def test_a_configuration_deep_inside_a_bucket_is_no_run(bucket: str, tmp_path: Path) -> None:
    """`best/config.json` is newer than the run's own."""
    begin(tmp_path / "bucket", "run", age_s=200)
    begin(tmp_path / "bucket" / "run", "best", age_s=100)
    assert newest_run(bucket) == "run"


def test_the_newest_run_is_found_without_listing_the_checkpoints_of_a_bucket(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path / "bucket", "run")
    selector, listed = pyarrow.fs.FileSelector, []

    def recorded(path: str, **options: Any) -> Any:
        listed.append((path, options.get("recursive", False)))
        return selector(path, **options)

    monkeypatch.setattr(pyarrow.fs, "FileSelector", recorded)
    assert newest_run(bucket) == "run"
    assert listed == [(str(tmp_path / "bucket"), False)]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def held(tmp_path: Path) -> Iterator[RunStorage]:
    """A run whose folder another process holds."""
    run = run_storage(str(tmp_path), "one")
    run.local.mkdir()
    command = [sys.executable, "-c", HOLD, str(run.local / LOCK_FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield run
        other.kill()


def test_a_run_that_another_process_holds_is_refused(held: RunStorage) -> None:
    with pytest.raises(RunHeld, match=r"one is in use by another live driver; .* --name"):
        held.lock()


def test_a_lock_is_free_again_when_its_holder_was_killed(tmp_path: Path) -> None:
    run = run_storage(str(tmp_path), "one")
    run.local.mkdir()
    command = [sys.executable, "-c", HOLD, str(run.local / LOCK_FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        other.kill()
    with run.lock():
        pass


def test_a_lock_is_free_again_after_its_with_block(tmp_path: Path) -> None:
    run = run_storage(str(tmp_path), "one")
    first = run.lock()
    with first, pytest.raises(RunHeld):
        run.lock()
    with run.lock():
        assert first  # still referred to, yet released


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_owner(tmp_path)
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    with pytest.raises(ValueError, match=f"belongs to user {me}, not to you"):
        check_owner(tmp_path)


def test_a_new_folder_below_a_writable_one_is_writable(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


def test_a_storage_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is no folder; choose another --storage_path"):
        check_writable(str(tmp_path / "file" / "runs"))


@pytest.mark.parametrize("path", ["/proc/nkat", "/sys/nkat"])
def test_a_storage_path_that_even_root_cannot_write_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be written .* choose another --storage_path"):
        check_writable(path)


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be reached"):
        check_writable("nosuchscheme://bucket/runs")
