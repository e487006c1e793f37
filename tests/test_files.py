"""A file is replaced whole or not at all."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from nkat_ray import files
from nkat_ray.files import nearest_existing, write_atomically


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


def test_a_file_that_a_reader_holds_open_is_replaced_once_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows replaces no file that another process reads, such as TensorBoard."""
    replace, tries = os.replace, []

    def held_open(*paths: Any) -> None:
        tries.append(paths)
        if len(tries) < closed_at:
            raise PermissionError(13, "held open by a reader")
        replace(*paths)

    monkeypatch.setattr(files, "REPLACE_PAUSES_S", (0, 0))
    monkeypatch.setattr(os, "replace", held_open)
    closed_at = 3
    write_atomically(tmp_path / "file", b"new")
    closed_at = 99
    with pytest.raises(PermissionError):
        write_atomically(tmp_path / "file", b"newer")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"new"}


# Reported in safetensors/safetensors#782, huggingface/sentence-transformers#4010
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_it_is_for_the_umask_to_say(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_the_nearest_place_that_exists(tmp_path: Path) -> None:
    assert nearest_existing(tmp_path) == tmp_path
    assert nearest_existing(tmp_path / "runs" / "new") == tmp_path
