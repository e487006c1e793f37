"""Whatever is typed, and whatever lies in a run's folder: an exit code of the README, one line, never a traceback.

Only what ends before real work is run: plans, tables, reports, and everything that is refused.
"""

import contextlib
import io
import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from nkat_ray.cli import COMMANDS, main
from nkat_ray.commands.train import TrainConfig
from nkat_ray.config import RunConfig, field_names

CODES = {0, 1, 2, 3, 4, 5, 130}  # README.md, "Exit codes"
HUGE = "1" + "0" * 400
LONG = "a" * 5000

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's and TOML's, of what is damaged
check = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home where a file, a folder, a search space and some pictures lie; nothing is measured, no network built."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in ("NKAT_DATA_DIR", "NKAT_STORAGE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("nkat_ray.commands.plan.measured_flops_per_s", lambda config, on_gpu: 1e10)
    monkeypatch.setattr("nkat_ray.commands.simulate.baseline_lambdas", lambda: {"lambda 20": 20.0})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Path("file").write_text("text")
    Path("folder").mkdir()
    Path("mine.toml").write_text('lr = { low = 1e-4, high = 1e-2 }\nconv_stem = ["off"]\n')
    for name in ("a", "b"):
        Path("photos", name).mkdir(parents=True)
        for n in range(2):
            Image.fromarray(np.full((4, 4, 3), 90 * n, np.uint8)).save(f"photos/{name}/{n}.png")
    return tmp_path


def said(*words: object, codes: Collection[int] = CODES - {1}) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `nkat` in this process, with what must hold of each run.

    Of the README's codes 1, an internal fault, would be the fault that is looked for.
    """
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["nkat", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
    code, text = ended.value.code, err.getvalue()
    assert code in codes, text
    assert "Traceback" not in out.getvalue() + text
    if code == 2 and text:  # `nkat data verify` says it in its table
        assert text.startswith("error: ")
        assert text.count("\n") == 1
        assert text.endswith("\n")
    return int(code or 0), out.getvalue(), text


def refused(*words: object) -> str:
    """What a bad command line is told."""
    code, _, text = said(*words)
    assert code == 2, (words, code, text)
    return text


# --- command lines ----------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["0", "1", "-1", "2", "0.5", "-0.0", "1e400", "-1e400", "nan", "inf", "-inf", "1e-320", HUGE, "-" + HUGE,
     "9" * 5000, "1_0", "²", "٣", "off", "auto", "None", "True", "global",
     "quick", "extended", "", " ", "-", "--", "=", "a=b",
     "\0", "\n", "\ud800", "[red]", "é", "💥", LONG, "file", "folder", "/", ".", "..", "~", "mine.toml", "file/x",
     "folder/none", "s3:/x", "nosuch://bucket/x", "cifar10", "mnist"]
)  # fmt: skip
FLAGS = {
    "tune": sorted(set(field_names(RunConfig)) - {"dry_run", "address"}),
    "train": sorted(set(field_names(TrainConfig)) - {"out"}),
    "simulate": ["accuracy", "quiet", "json"],
    "report": ["out", "quiet", "json"],
    "evaluate": ["transfer", "transfer_epochs", "datasets", "gpus_per_trial", "seed", "data", "out", "json"],
    "explain": ["images", "dataset", "out", "data_dir"],
}


@st.composite
def flags(draw: st.DrawFn, command: str) -> list[str]:
    """Some flags of a command with a word or several each, in the ways that they can be typed."""
    words: list[str] = []
    for _ in range(draw(st.integers(0, 3))):
        name = "--" + draw(st.sampled_from(FLAGS[command]))
        values = draw(st.lists(WORDS, max_size=2))
        style = draw(st.sampled_from(["apart", "joined", "dashes"]))
        name = name.replace("_", "-") if style == "dashes" else name
        words += [f"{name}={values[0]}", *values[1:]] if style == "joined" and values else [name, *values]
    return words


def nowhere_else(words: list[str]) -> bool:
    """Nothing is looked for in a bucket, whose client would wait for the network, and nothing is resumed."""
    return not any("://" in word for word in words) or "--storage_path" not in words


@pytest.mark.parametrize(
    "flag",
    ["top_k", "train_images", "test_images", "max_survivors", "max_concurrent", "cpus_per_trial",
     "max_failed", "clip_grad", "stage1_hours", "seed"],
)  # fmt: skip
def test_a_number_beyond_all_floats_is_refused_by_name(flag: str) -> None:
    assert f"{flag} is " in refused("tune", "--preset", "quick", "--dry_run", f"--{flag}", HUGE)


@check
@given(flags("tune"))
@example(["--top_k", HUGE])
@example(["--warm_start", LONG])
@example(["--resume", "--storage_path", LONG])
@example(["--storage_path", "\0"])
@example(["--space", LONG + ".toml"])
@example(["--gpus_per_trial", "1e-320"])
@example(["--stage1_hours", "9e15"])
def test_a_search_is_planned_or_refused(words: list[str]) -> None:
    if nowhere_else(words):
        said("tune", "--preset", "quick", "--dry_run", *words)


@check
@given(flags("train"), st.sampled_from(["folder", "file", "none", LONG, "\0", "/"]))
@example([], LONG)
@example(["--out"], "folder")
def test_a_training_is_refused_where_there_is_none_to_resume(words: list[str], out: str) -> None:
    refused("train", "--resume", "--out", out, *words)


@check
@given(flags("train"))
def test_a_training_without_data_is_refused(words: list[str]) -> None:
    refused("train", "--data_dir", "folder", *words, "--data", "auto", "--dataset", "nosuch")


@check
@given(
    flags("simulate"), st.lists(st.tuples(st.sampled_from(["mnist", "cifar10", "svhn", "", "é"]), WORDS), max_size=2)
)
@example([], [("mnist", "nan")])
@example([], [("mnist", "1e400")])
@example(["--accuracy", "mnist"], [])
def test_a_simulation_is_shown_or_refused(words: list[str], given: list[tuple[str, str]]) -> None:
    pairs = [f"{name}={value}" for name, value in given]
    said("simulate", *words, *(["--accuracy", *pairs] if pairs else []))


@check
@given(st.sampled_from(["report", "evaluate", "explain"]), WORDS, st.data())
@example("report", LONG, None)
@example("evaluate", LONG, None)
@example("explain", LONG, None)
@example("explain", "\0", None)
def test_what_is_no_run_is_refused(command: str, target: str, data: st.DataObject | None) -> None:
    words = data.draw(flags(command)) if data else []
    assert said(command, target, *words)[0] in (2, 0 if target == "--" else 2)


@check
@given(st.sampled_from(["photos", "file", "folder", "none", LONG, "\0", "/proc/self"]),
       st.sampled_from(["made", "folder", "file", "file/x", LONG, "\0", "/proc/none", ""]), WORDS,
       st.sampled_from(["0.2", "0", "1", "nan", "-1", "x"]), WORDS)  # fmt: skip
@example("photos", "file", "mine", "0.2", "0")
@example("photos", "file/x", "mine", "0.2", "0")
@example("photos", "/proc/none", "mine", "0.2", "0")
@example("photos", LONG, "mine", "0.2", "0")
@example("photos", "made", "mine", "0.2", "-1")
def test_an_import_is_made_or_refused(folder: str, out: str, name: str, fraction: str, seed: str) -> None:
    said("data", "import", folder, "--out", out, "--name", name, "--test_fraction", fraction, "--seed", seed)


@check
@given(st.sampled_from(["list", "verify"]), WORDS, st.lists(WORDS, max_size=2))
@example("list", LONG, [])
@example("verify", "folder", [LONG])
def test_a_folder_of_data_is_listed_or_refused(command: str, folder: str, names: list[str]) -> None:
    said("data", command, "--data_dir", folder, *(["--names", *names] if command == "verify" and names else []))


@check
@given(
    st.lists(
        WORDS | st.sampled_from([*COMMANDS, "--help", "--version"]).filter(lambda word: word != "doctor"), max_size=2
    )
)
def test_any_other_words_are_answered(words: list[str]) -> None:
    if words[:1] not in (["tune"], ["train"]) and words[:2] != ["data", "fetch"]:  # which would begin
        assert said(*words)[0] in (0, 2)


# --- what lies in a folder --------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.sampled_from([None, False, True, -1, 0, 3, 0.5, float("nan"), "", "x", "off", "quick", "mine.toml"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "low", "values"]), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYS = ["data_dir", "fixed", "found", "own_space", "space", "depth", "gate", "datasets", "preset", "name", "winner"]
OBJECTS = st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4).map(json.dumps)
TEXTS = (
    OBJECTS
    | JSON.map(json.dumps)
    | st.sampled_from(["", "{", "[[" * 5000, '{"a": 1', "\x00\xff", '{"data_dir": null}'])
)
WHERE = ("config.json", "summary.json", "journal.jsonl", "training.json", "weights.safetensors", "trials.parquet")


@contextlib.contextmanager
def run_folder(files: dict[str, str]) -> Iterator[Path]:
    """A folder `runs/r` with these files, and no others."""
    folder = Path("runs/r")
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / file).write_bytes(text.encode("latin-1", "replace"))
    try:
        yield folder
    finally:
        for file in files:
            (folder / file).unlink()


@check
@given(st.dictionaries(st.sampled_from(WHERE), TEXTS, max_size=4))
@example({"config.json": "[]", "summary.json": "{}"})
@example({"config.json": "null", "journal.jsonl": ""})
@example({"config.json": "{}", "journal.jsonl": ""})
@example({"config.json": '{"data_dir": 5, "found": {}}', "journal.jsonl": ""})
@example({"config.json": '{"fixed": [], "depth": "x"}'})
@example({"config.json": '{"fixed": [], "depth": 2.5}'})
@example({"config.json": '{"fixed": [], "space": "x.toml", "own_space": {"lr": 5}}'})
@example({"config.json": "[[" * 5000})
@example({"training.json": "[]"})
@example({"training.json": "{}"})
@example({"training.json": '{"data_dir": 5}'})
@example({"weights.safetensors": "[]"})
def test_a_damaged_run_is_refused(files: dict[str, str]) -> None:
    """JSON of the right keys with nonsense in them may still be an internal fault: one line, and a log."""
    with run_folder(files) as folder:
        for words in (
            ["report", folder],
            ["report", folder, folder, "--out", "two.html"],
            ["tune", "--dry_run", "--resume", "--name", "r", "--storage_path", "runs"],
            ["tune", "--dry_run", "--preset", "quick", "--warm_start", folder],
            ["explain", folder],
        ):
            said(*words, codes=CODES)
        refused("evaluate", folder, "--data_dir", "folder")
        if "training.json" in files:
            said("train", "--resume", "--out", folder, "--data_dir", "folder")


def test_a_fault_is_one_line_and_a_log(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("nkat_ray.commands.simulate.simulate", fail)
    code, out, text = said("simulate", codes=[1])
    assert (code, out, text.count("\n")) == (1, "", 1)
    log = Path(text.strip().rpartition("the log is ")[2])
    assert log.parent == place
    assert "RuntimeError: first" in log.read_text()


def test_a_full_disk_is_a_fault_and_a_bad_path_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: OSError) -> Any:
        def raise_it(*_: Any) -> None:
            raise error

        return raise_it

    monkeypatch.setattr("nkat_ray.commands.simulate.simulate", fail(OSError(28, "No space left on device")))
    said("simulate", codes=[1])
    monkeypatch.setattr("nkat_ray.commands.simulate.simulate", fail(PermissionError(13, "Permission denied", "x/y")))
    said("simulate", codes=[1])  # nobody has typed that path
    monkeypatch.setattr("nkat_ray.commands.report.report", fail(PermissionError(13, "Permission denied", "x/y")))
    assert refused("report", "x") == "error: 'x/y': Permission denied; choose another path\n"
