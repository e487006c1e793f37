"""A file is replaced whole or not at all."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from nkat_ray.files import write_atomically


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"new")
    write_atomically(tmp_path / "file", b"newer")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"newer"}


@pytest.mark.parametrize(("owner", "function"), [(os, "replace"), (os, "fsync"), (Path, "open")])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, function: str
) -> None:
    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(owner, function, full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", b"new")
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_it_is_for_the_umask_to_say(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
