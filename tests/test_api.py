"""The Python interface: on made-up runs, on one small training, and in a real Jupyter kernel."""

import inspect
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import optuna
import pandas as pd
import pyarrow as pa
import pytest
import torch
from nbclient import NotebookClient

import nkat_ray as nkat
from nkat_ray.commands import train as train_command
from nkat_ray.commands import tune as tune_command
from nkat_ray.config import RunConfig, TrialConfig
from nkat_ray.errors import FAULT, INTERRUPTED
from nkat_ray.files import BEST_FOLDER, CONFIG_FILE, STAGE2_FILE, STUDY_FILE, SUMMARY_FILE
from nkat_ray.model import create_nkat_vit
from nkat_ray.record.study import open_study_file
from nkat_ray.report.progress import Progress
from nkat_ray.report.terminal import NotebookScreen, Screen
from nkat_ray.train.checkpoint import Weights
from nkat_ray.train.loop import Trainer
from nkat_ray.train.transfer import save_weights

ROOT = Path(__file__).parents[1]
MakeRun = Callable[..., Any]
TINY: dict[str, Any] = dict(
    preset="quick", data="synthetic", embed_dim=16, depth=1, num_samples=2, epochs=2, grace=1, warmup=0, gate=0.05,
    train_images=400, val_images=200, transfer_images=300, test_images=200, transfer_epochs=1, max_concurrent=1,
    datasets=["cifar10", "mnist"],
)  # fmt: skip


def save_network(folder: Path) -> Any:
    """Leave a small untrained network as a run's best; return it."""
    config = TrialConfig(embed_dim=16, num_heads=2, depth=1)
    model = create_nkat_vit(config, num_classes=10).eval()
    weights = Weights(
        config=config, dataset="cifar10", num_classes=10, grey=False, mean=(0.5,) * 3, std=(0.25,) * 3, epoch=1,
        val_accuracy=0.5, seed=0, tensors=model.state_dict(),
    )  # fmt: skip
    save_weights(weights, weights.to_bytes(), folder / BEST_FOLDER)
    return model


# --- importing --------------------------------------------------------------------------------------------------------


def loaded_after(code: str) -> set[str]:
    """Return which of the heavy packages a fresh process has loaded after some code."""
    lines = f"import sys; import nkat_ray as nkat\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    return {"torch", "ray", "numpy", "pandas"} & set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("") == set()


def test_bad_input_is_refused_without_torch_and_ray() -> None:
    code = "try: nkat.tune(gate=7)\nexcept nkat.UserError: pass\nelse: raise SystemExit('not refused')"
    assert not {"torch", "ray"} & loaded_after(code)


def test_every_public_name_is_there_and_no_other() -> None:
    assert set(nkat.__all__) <= set(dir(nkat))
    assert all(inspect.getdoc(getattr(nkat, name)) for name in nkat.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = nkat.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("before", ["", "import nkat_ray.train.augment", "from nkat_ray import train"])
def test_train_is_a_function_and_a_package_whatever_was_imported_first(before: str) -> None:
    refused = "try: nkat.train(epochs=0)\nexcept nkat.UserError: pass\nelse: raise SystemExit('not refused')"
    assert "torch" in loaded_after(f"{before}\n{refused}\nimport nkat_ray.train.loop as loop; loop.Trainer")


def test_the_package_that_can_be_called_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(nkat.train)) is sys.modules["nkat_ray.train"]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_sample": 3}, "there is no setting 'num_sample'; did you mean num_samples?"),
        ({"zzz": 3}, "there is no setting 'zzz'; `tune_round2.py --help_all` lists the settings"),
        ({"conv_stem": "tinny"}, "conv_stem is 'tinny'; allowed: off, tiny, small"),
        ({"num_samples": "3"}, "num_samples is '3'; allowed: a whole number"),
        ({"gate": math.nan}, "gate is nan; allowed: a number, > 0 and <= 1"),
        ({"data_dir": ""}, "data_dir is ''; it is empty; allowed: a path"),
        ({"data_dir": Path("a\0b")}, "it contains a NUL byte; allowed: a path"),
        ({"storage_path": "a\0b"}, "storage_path is 'a\\x00b'; it contains a NUL byte; allowed: text with a path"),
        ({"storage_path": "\ud800"}, "storage_path is '\\ud800'; it is not in utf-8"),
        ({"storage_path": "a" * 300}, "File name too long; choose another --storage_path"),
        ({"storage_path": "~nobody-of-that-name/runs"}, "choose another --storage_path"),
        ({"name": "a\0b"}, "name is 'a\\x00b'; allowed: 1..100 letters"),
        ({"name": "a" * 300}, "; allowed: 1..100 letters"),
        ({"seed": 10**20}, "seed is 100000000000000000000; allowed: a whole number, 0..4294967295"),
        ({"num_samples": 1e9}, "num_samples is 1000000000.0; allowed: a whole number, 1..100000"),
        ({"lr": math.nan}, "lr is nan; allowed: a number, > 0 and <= 1"),
        ({"gate": math.inf}, "gate is inf; allowed: a number, > 0 and <= 1"),
        ({"objective": "local_tpe"}, "--objective was removed; Local TPE is the only objective"),
        ({"scheduler": "hyperband"}, "--scheduler hyperband was removed; use --scheduler asha"),
        ({"dry_run": True}, "dry_run is True; only the command line has --dry_run; leave it out"),
        ({"json": True}, "json is True; only the command line has --json; leave it out"),
        ({"resume": True, "name": "never-was"}, "never-was"),
    ],
)
def test_bad_settings_of_a_search_are_refused_and_nothing_is_written(
    settings: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(nkat.UserError, match=re.escape(said)):
        nkat.tune(**settings)
    assert not list(tmp_path.iterdir())


def test_settings_may_be_spelled_as_they_are_typed_or_as_python_has_them() -> None:
    taken = tune_command.PROGRAM.take(
        {
            "top_p": "off",
            "data_dir": "images",
            "datasets": ["cifar10"],
            "storage_path": Path("r"),
            "lr": np.float64(1e-3),
            "space": "quick",
            "randaugment": [2, 9],
            "max_concurrent": "auto",
        }
    )
    assert taken == tune_command.PROGRAM.read(
        "--top_p off --data_dir images --datasets cifar10 --storage_path r --lr 1e-3 --space quick --randaugment 2 9 "
        "--max_concurrent auto".split()
    )
    assert RunConfig(**taken).top_p is None


def test_help_and_completion_know_every_setting() -> None:
    shown = inspect.signature(nkat.tune).parameters
    assert shown["num_samples"].default == RunConfig.num_samples
    assert set(vars(RunConfig())) - set(shown) == {"dry_run", "json"}


# --- how a search ends ------------------------------------------------------------------------------------------------


@pytest.fixture
def search(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Replaces the search itself: `search(code)` makes it end so, with a run's folder and document."""

    def replace(code: int, *, document: bool = True, **options: Any) -> Path:
        folder: Path = make_run("made", **options).folder

        def start(config: RunConfig, space: object, screen: Screen) -> int:
            if document:
                screen.conclude({"folder": folder, "exit_code": code}, [])
            if code == FAULT:
                screen.fault("OSError: broken; the log is error.log")
            return code

        monkeypatch.setattr(tune_command, "start", start)
        return folder

    return replace


@pytest.mark.parametrize(("code", "options"), [(0, {}), (3, {"gate": 1.0})])
def test_a_search_that_has_ended_is_a_run(code: int, options: dict[str, Any], search: Callable[..., Path]) -> None:
    folder = search(code, **options)
    run = nkat.tune(preset="quick", quiet=True)
    assert run.folder == folder
    assert (run.best is None) == (code == 3)


def test_an_interrupt_says_how_to_continue_the_run(search: Callable[..., Path], tmp_path: Path) -> None:
    search(INTERRUPTED, running=True)
    with pytest.raises(KeyboardInterrupt) as raised:
        nkat.tune(preset="quick", storage_path=tmp_path, quiet=True)
    said = f"continue with nkat.tune(resume=True, name='made', storage_path='{tmp_path}')"
    assert str(raised.value).endswith(said)


def test_a_fault_is_an_error_that_names_the_log(search: Callable[..., Path]) -> None:
    search(FAULT, document=False)
    with pytest.raises(RuntimeError, match=r"broken; the log is error.log; continue with nkat.tune\(resume=True\)"):
        nkat.tune(preset="quick", quiet=True)


# --- a training -------------------------------------------------------------------------------------------------------


def test_a_training_returns_what_the_command_writes(
    tmp_path: Path,
    tinted: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nkat_ray.data import Split
    from nkat_ray.data.parquet import pair_path, write_split
    from nkat_ray.record.tables import read_summary

    names = tuple(f"tint {n}" for n in range(10))
    for split, n in (("train", 200), ("test", 50)):
        path = pair_path(tmp_path, "tints", split)  # type: ignore[arg-type]
        write_split(path, Split(*tinted(n)), class_names=names, source="a test", encoding="png", flip=True)
    small: dict[str, Any] = dict(embed_dim=16, num_heads=2, depth=1, batch_size=32, warmup=0, val_images=40)
    here: dict[str, Any] = dict(dataset="tints", data_dir=str(tmp_path), out=str(tmp_path / "out"))
    result = nkat.train(**here, **small, epochs=1, randaugment="off")
    written = read_summary(tmp_path / "out" / "result.json")
    assert {name: result[name] for name in ("test_accuracy", "ci_low", "n_test")} == {
        name: written[name] for name in ("test_accuracy", "ci_low", "n_test")
    }
    assert result["folder"] == tmp_path / "out"
    assert "epoch 1/1" in capsys.readouterr().out
    with pytest.raises(nkat.UserError, match="contains a training; continue it"):
        nkat.train(**here, **small, epochs=1)
    monkeypatch.setattr(Trainer, "_step", lambda self, batch, n: torch.tensor(torch.nan))
    with pytest.raises(RuntimeError, match="the loss was not finite in epoch 1"):
        nkat.train(**{**here, "out": str(tmp_path / "b")}, **small, epochs=1)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_runs_tables_are_those_of_its_files(make_run: MakeRun) -> None:
    made = make_run()
    run = nkat.Run(made.folder)
    for name in ("trials", "curves", "stage2"):
        pd.testing.assert_frame_equal(getattr(run, name), pd.read_parquet(made.folder / f"{name}.parquet"))
    assert (run.name, run.folder) == (made.folder.name, made.folder)


def test_without_pandas_the_tables_are_pyarrows(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    trials = nkat.Run(make_run().folder).trials
    assert isinstance(trials, pa.Table)
    assert trials.num_rows == 8


def test_a_run_that_goes_on_shows_what_there_is(make_run: MakeRun) -> None:
    run = nkat.Run(make_run(running=True).folder)
    assert len(run.trials) == 8
    assert (run.best, run.study, run.verdict.status) == (None, None, "undecided")
    assert not (run.folder / STUDY_FILE).exists()  # nothing is made by looking
    assert "This run has not ended." in run._repr_html_()
    with pytest.raises(nkat.UserError, match="no best survivor"):
        run.model()


def test_the_best_survivor_is_the_summarys_and_its_configuration_trains_again(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NKAT_DATA_DIR", raising=False)
    made = make_run()
    best = nkat.Run(made.folder).best
    assert best is not None
    winner = made.summary["winner"]
    assert best.trial == winner["trial"]
    assert best.scores == {name: winner[name] for name in ("global_tpe", "consistency", "robustness")}
    assert best.interval is not None
    assert best.interval[0] < best.scores["global_tpe"] < best.interval[1]
    assert TrialConfig(**best.config) == TrialConfig(epochs=12)
    assert best.command == f"nkat train --epochs 12 --seed {made.trials[best.trial]['seed']}"


def test_the_model_computes_what_the_saved_network_computed(make_run: MakeRun) -> None:
    run = nkat.Run(make_run().folder)
    model = save_network(run.folder)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(run.model()(images), model(images))
    (run.folder / BEST_FOLDER / "weights.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")  # a pickle
    with pytest.raises(nkat.UserError, match="holds no readable model"):
        run.model()


def test_the_study_is_optunas(make_run: MakeRun) -> None:
    run = nkat.Run(make_run().folder)
    study = optuna.create_study(study_name="nkat", storage=open_study_file(run.folder / STUDY_FILE))
    study.add_trial(optuna.create_trial(value=0.5))
    assert run.study is not None
    assert [trial.value for trial in run.study.trials] == [0.5]


def test_the_report_is_written_where_it_is_missing_or_old_and_kept_where_it_is_new(make_run: MakeRun) -> None:
    run = nkat.Run(make_run().folder)
    page = run.report()
    assert "Global TPE" in page.read_text()
    page.write_text("mine")
    assert run.report().read_text() == "mine"
    os.utime(page, (1, 1))
    assert run.report().read_text() != "mine"
    going_on = nkat.Run(make_run("on", running=True).folder)
    going_on.report().write_text("mine")
    assert going_on.report().read_text() != "mine"


def test_a_run_is_shown_as_text_and_as_html(make_run: MakeRun) -> None:
    run = nkat.Run(make_run().folder)
    assert re.search(r"Global TPE \(4 of 4\) +0\.53 +0\.619 \[0\.617, 0\.622\] +>= 0\.70 +-0\.081", repr(run))
    assert "\x1b" not in repr(run)
    cells = re.findall(r"<td>(.*?)</td>", run._repr_html_())
    assert cells[:5] == ["Global TPE (4 of 4)", "0.53", "0.619 [0.617, 0.622]", "&ge; 0.70", "-0.081"]
    assert len(cells) == 15


def test_what_a_run_says_of_itself_is_escaped(make_run: MakeRun) -> None:
    made = make_run()
    text = (made.folder / SUMMARY_FILE).read_text()
    (made.folder / SUMMARY_FILE).write_text(text.replace("Not reached", "<script>alert(1)</script>"))
    assert "<script" not in nkat.Run(made.folder)._repr_html_()


def test_without_a_survivor_there_is_no_table(make_run: MakeRun) -> None:
    run = nkat.Run(make_run(gate=1.0).folder)
    assert "<table" not in run._repr_html_()
    assert "no trial passed the gate" in run._repr_html_()
    assert run.best is None
    assert len(run.stage2) == 0
    assert "test_accuracy" in run.stage2


def test_a_run_is_found_by_name_and_by_folder(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run("first").folder
    assert nkat.Run("first", storage_path=str(tmp_path)).folder == folder
    monkeypatch.setenv("NKAT_STORAGE_PATH", str(tmp_path))
    assert nkat.Run("first").folder == nkat.Run(folder).folder == nkat.Run(str(folder)).folder == folder
    with pytest.raises(nkat.UserError, match="run is 'second'; there is no such folder, and no run of that name in"):
        nkat.Run("second")
    (tmp_path / "empty").mkdir()
    with pytest.raises(nkat.UserError, match="contains no run"):
        nkat.Run("empty")


def test_runs_are_listed_oldest_first_without_those_that_are_damaged(make_run: MakeRun, tmp_path: Path) -> None:
    for age, name in enumerate(("new", "old")):
        os.utime(make_run(name).folder / CONFIG_FILE, (1e9 - age, 1e9 - age))
    (make_run("broken").folder / STAGE2_FILE).unlink()
    with pytest.warns(UserWarning, match=r"its stage2\.parquet is missing"):
        found = nkat.runs(tmp_path)
    assert [run.name for run in found] == ["old", "new"]
    assert repr(found).splitlines() == [f"{run.name}: {run.verdict.sentence}" for run in found]
    shutil.rmtree(tmp_path / "broken")
    (tmp_path / "none").mkdir()
    assert repr(nkat.runs(tmp_path / "none")) == "no runs"
    with pytest.raises(nkat.UserError, match="there is no such folder"):
        nkat.runs(tmp_path / "nowhere")


def test_runs_are_compared_on_one_page(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = make_run("first").folder, make_run("second", gate=0.3).folder
    assert nkat.compare(nkat.Run(first), second) == Path("comparison.html")
    text = nkat.compare(first, second, out=tmp_path / "two.html").read_text()
    assert "first" in text
    assert "second" in text
    with pytest.raises(nkat.UserError, match="1 runs were given; allowed: two or more"):
        nkat.compare(first)


def test_bad_input_is_one_line_in_a_notebook() -> None:
    assert nkat.UserError("gate is 7")._render_traceback_() == ["UserError: gate is 7"]


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_code_of_the_page_runs(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block in order, as one notebook; the search and the training themselves are replaced."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NKAT_STORAGE_PATH", raising=False)
    folders = [make_run(f"runs/{name}").folder for name in ("first", "second")]
    save_network(folders[0])
    study = optuna.create_study(study_name="nkat", storage=open_study_file(folders[0] / STUDY_FILE))
    study.add_trial(optuna.create_trial(value=0.5))
    seen: list[Any] = []

    def search(config: RunConfig, space: object, screen: Screen) -> int:
        seen.append(config)
        screen.conclude({"folder": folders[0], "exit_code": 0}, [])
        return 0

    def training(config: train_command.TrainConfig, screen: Screen) -> int:
        seen.append(config)
        screen.conclude({"test_accuracy": 0.5, "ci_low": 0.4, "ci_high": 0.6, "folder": config.out}, [])
        return 0

    monkeypatch.setattr(tune_command, "start", search)
    monkeypatch.setattr(tune_command, "resume", search)
    monkeypatch.setattr(train_command, "train", training)
    page = (ROOT / "docs" / "python.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/python.md", "exec"), names)
    begun, resumed, longer = seen
    assert (begun.preset, begun.num_samples, begun.conv_stem, begun.name) == ("quick", 6, "tiny", "first")
    assert (resumed.resume, resumed.name) == (True, "first")
    assert (longer.epochs, longer.warmup) == (10, 1)
    assert names["classes"].shape == (4,)
    assert (tmp_path / "comparison.html").exists()


def test_the_page_names_what_a_run_has() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    assert set(re.findall(r"`run\.(\w+)", page)) == {name for name in vars(nkat.Run) if not name.startswith("_")}


# --- a notebook's output ----------------------------------------------------------------------------------------------


class Output:
    """Stands in for IPython's handle of an output that updates."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def update(self, content: dict[str, str], *, raw: bool) -> None:
        self.shown.append(content)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> tuple[NotebookScreen, Output]:
    output = Output()

    def display(content: dict[str, str], *, raw: bool, display_id: bool) -> Output:
        output.update(content, raw=raw)
        return output

    monkeypatch.setattr("IPython.display.display", display)
    return NotebookScreen(), output


def test_a_notebook_has_one_output_with_all_that_was_printed_and_what_is_live(
    notebook: tuple[NotebookScreen, Output],
) -> None:
    screen, output = notebook
    screen.print("note: <b>", markup=False)
    screen.show_below("bar")
    screen.print("second {}")
    texts = [shown["text/plain"] for shown in output.shown]
    assert texts == ["note: <b>\n", "note: <b>\nbar", "note: <b>\nsecond {}\nbar"]
    screen.show_below(None)
    assert output.shown[-1]["text/plain"] == "note: <b>\nsecond {}\n"
    assert "<b>" not in output.shown[-1]["text/html"]


def test_a_search_in_a_notebook_shows_header_notes_ended_trials_and_bars(
    notebook: tuple[NotebookScreen, Output], make_run: MakeRun
) -> None:
    screen, output = notebook
    made = make_run()
    with Progress(RunConfig.from_preset("quick", name="r", epochs=12), {}, console=screen) as progress:
        progress.on_notice("generated")
        progress.on_stage1_start(8)
        for trial in (0, 1):
            progress.on_trial_start(trial, made.trials[0])
            progress.on_epoch(trial, made.curves[0])
        progress.on_trial_end(0, made.trials[0])
        screen.refresh(at_once=True)
    lines = output.shown[-2]["text/plain"].splitlines()
    starts = ["r  preset quick", "note: generated", "trial 0: finished after 12 epochs", "Stage 1 ", "trial 1 "]
    for line, start in zip(lines, starts, strict=False):
        assert line.startswith(start)
    assert re.search(r"1/8 trials", lines[3])
    assert re.search(r"1/12 epochs", lines[4])
    assert len(output.shown[-1]["text/plain"].splitlines()) == 3  # what was printed stays, the bars go


def test_a_display_that_changes_often_is_not_sent_each_time(notebook: tuple[NotebookScreen, Output]) -> None:
    screen, output = notebook
    screen.print("first")
    for _ in range(100):
        screen.refresh()
    assert len(output.shown) == 1


def test_a_quiet_notebook_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: pytest.fail("something was shown"))
    screen = NotebookScreen(quiet=True)
    screen.print("first")
    screen.show_below("bar")


# --- for real ---------------------------------------------------------------------------------------------------------


@pytest.mark.cluster
def test_a_search_in_this_process_gives_the_run_that_its_folder_holds(tmp_path: Path) -> None:
    run = nkat.tune(**TINY, storage_path=tmp_path, name="r")
    assert run.folder == tmp_path / "r"
    assert len(run.trials) == 2
    assert run.best is not None
    assert run.model()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert run.study is not None
    assert len(run.study.trials) == 2
    assert run.report().stat().st_mtime < (run.folder / SUMMARY_FILE).stat().st_mtime  # the search's own: it is new
    assert repr(nkat.tune(resume=True, storage_path=tmp_path, name="r")) == repr(run)


@pytest.mark.slow
def test_the_quickstart_notebook_runs_in_a_kernel(tmp_path: Path) -> None:
    notebook: Any = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    _, search, shown, *_ = (cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    (progress,) = [output.data["text/plain"] for output in search if output.output_type == "display_data"]
    for part in ("data: cifar10: synthetic", "starting Ray", "trials at a time", "trial 2: ", "passed the gate"):
        assert part in progress, part
    assert "Global TPE" in shown[0].data["text/html"]


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook: Any = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    assert [cell for cell in notebook.cells if cell.get("outputs")] == []
