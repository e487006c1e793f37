"""The command line: bad input ends with one line and exit code 2, before anything is written."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nkat_ray.cli import main, run_command, tune
from nkat_ray.config import RunConfig
from nkat_ray.errors import INTERRUPTED, UserError
from nkat_ray.space import space_of

ROOT = Path(__file__).parents[1]

BAD_FLAGS = {
    "gate of 0": (["--gate", "0"], "gate is 0"),
    "gate of 7": (["--gate", "7"], "gate is 7"),
    "gate is no number": (["--gate", "high"], "high"),
    "no trials": (["--num_samples", "0"], "num_samples is 0"),
    "unknown preset": (["--preset", "huge"], "huge"),
    "unknown flag": (["--gpu_count", "3"], "gpu_count"),
    "patch does not divide": (["--patch_size", "3"], "patch_size is 3"),
    "heads do not divide": (["--embed_dim", "100"], "embed_dim is 100"),
    "fixed value against the space": (["--num_heads", "7"], "embed_dim is"),
    "empty name": (["--name", ""], "name is ''"),
    "absolute name": (["--name", "/tmp/run"], "name is '/tmp/run'"),
    "name with dots": (["--name", "a..b"], "name is 'a..b'"),
    "parent as name": (["--name", "../a"], "name is '../a'"),
    "resume of an unknown run": (["--resume", "--name", "never-was"], "never-was"),
    "resume of nothing": (["--resume"], "no run to resume"),
    "cifar10 left out": (["--datasets", "mnist"], "cifar10"),
}


@pytest.mark.parametrize(("flags", "said"), BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_a_bad_flag_is_refused_in_one_line_and_nothing_is_written(flags, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tune(["--data", "synthetic", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert said in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("here", "words", "said"),
    [
        ("", ["tune_round2.py", "--storage_path", "実験"], "storage_path is "),
        ("", ["nkat", "data", "list", "--data_dir", "実験"], "data_dir is "),
        ("", ["nkat", "report", "実験"], "runs is "),
        ("", ["nkat", "stop", "実験", "1"], "run is "),
        ("実験", ["tune_round2.py"], "storage_path is './runs', "),
        ("実験", ["tune_round2.py", "--storage_path", "/tmp"], "the current folder is "),
        ("", ["tune_round2.py", "--name", "実験"], "name is "),
    ],
)
def test_names_that_python_cannot_decode_are_refused_before_anything_is_written(here, words, said, tmp_path):
    """As in a container or under cron without a locale, where somebody has switched Python's UTF-8 mode off."""
    (tmp_path / "実験").mkdir()
    call = "main()" if words[0] == "nkat" else "raise SystemExit(tune(argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", f"from sys import argv; from nkat_ray.cli import main, tune; {call}", *words[1:]],
        cwd=tmp_path / here,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
    assert "it is not in ascii" in done.stderr or "allowed: 1..100 letters" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["実験"]


def test_a_bad_flag_is_one_line_on_a_terminal_that_knows_ascii_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "tune_round2.py", "--gate", "high"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: gate is 'high'; allowed: a number, > 0 and <= 1")


def test_bad_input_is_refused_quickly_by_the_program_itself(tmp_path):
    clock = time.monotonic()
    done = subprocess.run(
        [sys.executable, ROOT / "tune_round2.py", "--gate", "7"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert time.monotonic() - clock < 15
    assert not list(tmp_path.iterdir())


def test_nothing_large_is_loaded_to_refuse_a_flag(tmp_path):
    code = (
        "import sys; from nkat_ray.cli import tune; assert tune(['--gate', '7']) == 2; "
        "sys.exit(bool({'torch', 'ray', 'plotly', 'tensorboard'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


INTERRUPTS = """
import os, signal, sys

class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever ignored it before
sys.meta_path.insert(0, Interrupts())
"""


@pytest.mark.parametrize("module", ["nkat_ray", "nkat_ray.errors", "nkat_ray.cli", "nkat_ray.commands.tune"])
def test_ctrl_c_while_modules_are_loaded_is_one_line(tmp_path, module):
    """The real script; the signal comes when Python looks for a module."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS)
    done = subprocess.run(
        [sys.executable, ROOT / "tune_round2.py", "--gate", "7"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "INTERRUPTED_AT": module},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (INTERRUPTED, "error: interrupted\n")


@pytest.mark.parametrize("module", ["nkat_ray.cli", "nkat_ray.errors", "nkat_ray.commands.simulate"])
def test_so_it_is_of_the_console_script(tmp_path, module):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS)
    done = subprocess.run(
        [Path(sys.executable).with_name("nkat"), "simulate", "--nosuch"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "INTERRUPTED_AT": module},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (INTERRUPTED, "error: interrupted\n")


@pytest.mark.parametrize("words", [["--nosuch"], ["."], ["never-was"], ["--seeds", "0", "."]])
def test_nor_to_refuse_an_evaluation(tmp_path, words):
    code = (
        "import sys; from nkat_ray.cli import _guarded; "
        "assert _guarded('evaluate', sys.argv[1:]) == 2; "
        "sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, check=False).returncode == 0


def write_pair(folder, name="cifar10", labels=None, n=60):
    """A small Parquet pair of a source of its own, so that no known digest applies."""
    labels = np.arange(n) % 10 if labels is None else labels
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8).tobytes() for _ in labels]
    metadata = {"encoding": "raw", "shape": "32,32,3", "classes": ",".join("abcdefghij"), "source": "own"}
    table = pa.table({"image": pa.array(images, pa.binary()), "label": pa.array(labels, pa.int64())})
    for split in ("train", "test"):
        pq.write_table(table.replace_schema_metadata(metadata), folder / f"{name}-{split}.parquet")


def empty(folder):
    return "cifar10"


def absent(folder):
    folder.rmdir()
    return str(folder)


def truncated(folder):
    write_pair(folder)
    path = folder / "cifar10-train.parquet"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return "cifar10-train.parquet"


def wrong_digest(folder):
    write_pair(folder)
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  cifar10-train.parquet\n")
    return "cifar10-train.parquet"


def label_beyond_classes(folder):
    write_pair(folder, labels=np.array([0, 1, 10] * 20))
    return "label"


@pytest.mark.parametrize("damage", [empty, absent, truncated, wrong_digest, label_beyond_classes])
def test_a_bad_data_folder_is_refused_and_nothing_is_written(damage, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    said = damage(folder)
    assert tune(["--preset", "quick", "--data_dir", str(folder), "--storage_path", "out"]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert not Path("out").exists()


def test_a_storage_path_that_is_a_file_is_refused(tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert tune(["--data", "synthetic", "--storage_path", str(file)]) == 2
    assert f"{file} is no folder" in capsys.readouterr().err


def test_a_name_that_exists_is_refused(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert tune(["--data", "synthetic", "--storage_path", str(tmp_path), "--name", "mine"]) == 2
    assert "exists" in capsys.readouterr().err


def test_an_absent_tracker_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert tune(["--preset", "quick", "--data", "synthetic", "--log_to", "wandb"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: log_to is 'wandb'; that package is not installed")
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


def test_json_of_a_plan_is_all_that_stdout_gets(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tune(["--preset", "quick", "--data", "synthetic", "--dry_run", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    plan = json.loads(out)
    assert plan["configuration"]["num_samples"] == 6
    assert "Stage 1" in plan["plan"]
    assert err == ""


def test_json_of_a_simulation(capsys):
    assert run_command("simulate", ["--accuracy", "cifar10=0.8", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["scores"]["lambda 20"]["local_tpe"]["cifar10"] == pytest.approx(0.605, abs=5e-4)
    assert "Accuracy needed" in err


def test_bad_input_leaves_stdout_empty_for_a_script(capsys):
    assert tune(["--json", "--gate", "7"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "gate is 7" in err


def test_what_the_screen_shows_may_change_on_resume(tmp_path, monkeypatch):
    saved = RunConfig.from_preset(
        "quick", name="r", storage_path=str(tmp_path), quiet=True, json=True, log_to="mlflow", resume=True
    )
    monkeypatch.setattr("nkat_ray.commands.tune.saved_config", lambda *_: (saved, space_of(saved)))
    seen = []
    monkeypatch.setattr("nkat_ray.commands.tune.resume", lambda run, space, screen: seen.append(run) or 0)
    for flags in ([], ["--json", "--log_to", "off"]):
        assert tune(["--resume", "--name", "r", "--storage_path", str(tmp_path), *flags]) == 0
    assert [(run.quiet, run.json, run.log_to) for run in seen] == [(False, False, "mlflow"), (False, True, "off")]


@pytest.mark.parametrize(
    "error", [ValueError("of a tensor"), TypeError("of a bug"), KeyError("of a table"), ConnectionError("of a bucket")]
)
def test_only_a_user_error_is_bad_input(error, capsys, monkeypatch, tmp_path):
    """torch and json raise ValueErrors of their own: those are faults, with a log."""

    def fail(*_):
        raise error

    monkeypatch.setattr("nkat_ray.commands.tune.start", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert tune(["--preset", "quick"]) == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    log = Path(said.rpartition("the log is ")[2])
    assert log.parent == tmp_path
    assert f"{type(error).__name__}: " in log.read_text()
    assert "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evalute"], "there is no command 'evalute'; did you mean evaluate?"),
        (["zzz"], "there is no command 'zzz'; allowed: tune, train"),
        (["data", "lst"], "there is no subcommand 'lst'; did you mean list?"),
    ],
)
def test_a_misspelt_command_is_refused_with_a_suggestion(words, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nkat", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0), (["--version"], 0), (["data", "--help"], 0)])
def test_help_and_version_of_the_program(words, code, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nkat", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert re.match(r"usage: nkat |nkat-ray \d", out)
    assert not err


@pytest.mark.parametrize("words", ["simulate", "simulate --help", "--help"])
def test_a_reader_that_leaves_is_no_error(words):
    """`nkat ... | head -1`"""
    command = f"{sys.executable} -c 'from nkat_ray.cli import main; main()' {words} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert not done.stderr


# Reported in ray-project/ray#20886, ray-project/ray#42221
def test_a_resumed_run_may_get_more_trials_but_not_fewer(monkeypatch):
    from nkat_ray.commands.tune import read

    saved = RunConfig.from_preset("quick", name="r", num_samples=6)
    monkeypatch.setattr("nkat_ray.commands.tune.saved_config", lambda *_: (saved, space_of(saved)))
    assert read(["--resume", "--name", "r", "--num_samples", "12"])[0].num_samples == 12
    with pytest.raises(UserError, match="num_samples is 3; what is to be resumed has 6"):
        read(["--resume", "--name", "r", "--num_samples", "3"])
