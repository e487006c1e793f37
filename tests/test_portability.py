"""Windows and macOS, as far as Linux can tell: what they lack is taken away here, and the real code runs without it."""

import ast
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from nkat_ray.files import JOURNAL_FILE
from nkat_ray.record.journal import Journal, read_state
from nkat_ray.record.storage import check_owner, run_storage
from nkat_ray.record.study import load_study, open_study_file
from nkat_ray.report.wording import command_line

ROOT = Path(__file__).parents[1]
TEXT_FILES = {"read_text", "write_text"}
TEXT_OR_BINARY = {"open", "fdopen", "NamedTemporaryFile"}
BINARY_OPEN = {"Image.open", "tarfile.open", "gzip.open", "os.open"}
TINY = (
    "--preset quick --data synthetic --embed_dim 16 --depth 1 --num_samples 1 --epochs 1 --grace 1 --warmup 0 "
    "--gate 0.01 --train_images 400 --val_images 200 --transfer_images 300 --test_images 200 --transfer_epochs 1 "
    "--name r"
).split()
LIKE_WINDOWS = """
import os, sys

def refuse(*_, **__):
    raise OSError(1314, "a required privilege is not held by the client")

from nkat_ray.cli import tune

os.symlink = refuse
if "--dry_run" in sys.argv or "--resume" in sys.argv:  # no worker starts: Ray's need them here
    import ray  # so does its import

    del os.getuid, os.sysconf
sys.exit(tune(sys.argv[1:]))
"""
PLATFORMS = {
    "Windows": "x86_64-pc-windows-msvc",
    "macOS 14": "aarch64-apple-darwin",
    "Linux on x86_64": "x86_64-manylinux_2_28",
    "Linux on ARM": "aarch64-manylinux_2_28",
}


@pytest.fixture
def no_symbolic_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows allows none without developer mode."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(1314, "a required privilege is not held by the client")

    monkeypatch.setattr(os, "symlink", refuse)


# --- text files -------------------------------------------------------------------------------------------------------


def without_encoding(source: str) -> Iterator[str]:
    """Yield the calls that read or write text in the encoding of the locale, which is cp932 on a Japanese Windows."""
    for call in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        options = {option.arg: option.value for option in call.keywords}
        words = [n.value for n in [*call.args, *options.values()] if isinstance(n, ast.Constant)]
        binary = ast.unparse(call.func) in BINARY_OPEN or any(
            isinstance(word, str) and "b" in word for word in words[:2]
        )
        runs_as_text = isinstance(options.get("text"), ast.Constant)  # of a subprocess
        as_text = name in TEXT_FILES or (name in TEXT_OR_BINARY and not binary) or runs_as_text
        if as_text and "encoding" not in options:
            yield f"line {call.lineno}: {ast.unparse(call)}"


def test_every_text_file_is_utf_8() -> None:
    files = [*(ROOT / "nkat_ray").rglob("*.py"), ROOT / "tune_round2.py"]
    found = {str(path): calls for path in files if (calls := list(without_encoding(path.read_text(encoding="utf-8"))))}
    assert found == {}


@pytest.mark.parametrize(
    "code", ["p.read_text()", "p.write_text(t)", "open(p)", "p.open('a')", "os.fdopen(f, 'w')", "run(c, text=True)"]
)
def test_a_text_file_without_encoding_would_be_noticed(code: str) -> None:
    assert list(without_encoding(code))


# --- Optuna's journal -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_symbolic_links")
def test_a_study_is_written_without_symbolic_links(tmp_path: Path) -> None:
    path = tmp_path / "study.log"
    study = optuna.create_study(storage=open_study_file(path))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    found = load_study(path)
    assert found is not None
    assert len(found.trials) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["study.log"]


def test_a_study_of_0_1_0_is_read_and_continued(tmp_path: Path) -> None:
    """It was locked by a symbolic link; the file is the same."""
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))
    optuna.create_study(storage=storage).optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    found = load_study(tmp_path / "study.log")
    assert found is not None
    found.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert len(found.trials) == 3


# --- paths and commands as Windows has them ---------------------------------------------------------------------------


class FileOnWindows:
    """A file of a run's folder whose path relative to the folder has backslashes."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder, self.name = path, folder, path.name

    def __str__(self) -> str:
        return str(self.path)

    def __lt__(self, other: "FileOnWindows") -> bool:
        return self.path < other.path

    def __getattr__(self, name: str) -> Any:
        return getattr(self.path, name)

    def relative_to(self, _: Path) -> PureWindowsPath:
        return PureWindowsPath(*self.path.relative_to(self.folder).parts)


def test_keys_in_a_bucket_have_slashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = run_storage(f"file://{tmp_path}/bucket", "r")
    (run.local / "tensorboard" / "trial_0000").mkdir(parents=True)
    (run.local / "tensorboard" / "trial_0000" / "events").write_bytes(b"e")
    found = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, what: [FileOnWindows(p, self) for p in found(self, what)])
    run.push()
    monkeypatch.undo()
    assert (tmp_path / "bucket" / "r" / "tensorboard" / "trial_0000" / "events").read_bytes() == b"e"


def test_a_command_is_quoted_for_the_shell_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["nkat", "train", "--data_dir", r"C:\Users\Taro Yamada\data"]
    assert shlex.split(command_line(words)) == words
    monkeypatch.setattr(sys, "platform", "win32")
    assert command_line(words) == r'nkat train --data_dir "C:\Users\Taro Yamada\data"'


def test_a_damaged_journal_needs_no_sed_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(tmp_path).close()
    (tmp_path / JOURNAL_FILE).write_bytes(b"{}\n")
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ValueError, match=r"line 1 of 1 is damaged, .* text editor; --resume"):
        read_state(tmp_path)


# --- what Windows lacks -----------------------------------------------------------------------------------------------


def test_without_user_ids_every_folder_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getuid")
    check_owner(tmp_path)


def like_windows(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the main job without symbolic links, user ids and sysconf; text is ASCII by default, stdout is cp932."""
    env = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp932:strict"}
    env["LOGNAME"] = "taro"  # torch asks for the user's name, which Windows has in the environment
    command = [sys.executable, "-c", LIKE_WINDOWS, *TINY, "--storage_path", str(folder), *flags]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, timeout=400)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode("cp932"), done.stderr.decode())


def test_a_plan_needs_nothing_of_posix(tmp_path: Path) -> None:
    done = like_windows(tmp_path, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "Plan of a run with --preset quick" in done.stdout


@pytest.mark.cluster
def test_a_whole_run_needs_nothing_of_posix(tmp_path: Path) -> None:
    done = like_windows(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "r" / "summary.json").read_text(encoding="utf-8"))
    assert summary["survivors"] == [0]
    assert [path.name for path in (tmp_path / "r" / "tune").glob("*/trial_*")] == ["trial_0000"]
    names = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")]
    assert max(map(len, names)) < 100  # Windows allows 260 characters, with the folder that the user chose
    again = like_windows(tmp_path, "--resume")
    assert again.returncode == 0, again.stdout + again.stderr


# --- packages ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.13"])
@pytest.mark.parametrize("platform", PLATFORMS.values(), ids=PLATFORMS.keys())
def test_every_package_has_a_wheel(platform: str, python: str) -> None:
    flags = ["--python-platform", platform, "--python-version", python, "--only-binary", ":all:", "--no-header"]
    done = subprocess.run(
        ["uv", "pip", "compile", "--quiet", *flags, "pyproject.toml"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ray==" in done.stdout
    assert "torch==" in done.stdout
