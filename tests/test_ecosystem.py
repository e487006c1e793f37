"""Run the commands of docs/ecosystem.md: other tools read a run's files."""

import contextlib
import dataclasses
import importlib
import io
import json
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nkat_ray.config import TrialConfig
from nkat_ray.files import BEST_FOLDER, CURVES_FILE, STUDY_FILE, TRIALS_FILE
from nkat_ray.model import create_nkat_vit
from nkat_ray.record import tables
from nkat_ray.train.checkpoint import Weights
from nkat_ray.train.transfer import save_weights

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "ecosystem.md").read_text()
LINES = re.findall(r"^python -c .*$", PAGE, re.MULTILINE)
TRIALS = [
    {"trial": 0, "stop_reason": "finished", "epochs": 12, "best_local_tpe": 0.46, "config/depth": 7},
    {"trial": 1, "stop_reason": "asha", "epochs": 3, "best_local_tpe": 0.2206, "config/depth": 5},
    {"trial": 2, "stop_reason": "asha", "epochs": 3, "best_local_tpe": 0.31, "config/depth": 5},
    {"trial": 3, "stop_reason": "error", "epochs": 0, "best_local_tpe": None, "config/depth": 9},
]


def config() -> TrialConfig:
    return TrialConfig(embed_dim=16, num_heads=2, depth=1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a run's folder, its model included, the working directory."""
    tables.write_rows(tmp_path / TRIALS_FILE, TRIALS)
    curves = [{"trial": t, "epoch": e, "val_accuracy": 0.1 * e} for t, e in ((0, 1), (0, 2), (1, 1))]
    tables.write_rows(tmp_path / CURVES_FILE, curves)
    torch.manual_seed(0)
    mean = (0.25, 0.5, 0.75)
    weights = Weights(
        config=config(), dataset="cifar10", num_classes=10, grey=False, mean=mean, std=(0.2,) * 3, epoch=1,
        val_accuracy=0.1, seed=0, tensors=create_nkat_vit(config(), num_classes=10, mean=mean).state_dict(),
    )  # fmt: skip
    save_weights(weights, weights.to_bytes(), tmp_path / BEST_FOLDER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_line(line: str) -> str:
    """Run a documented one-liner in this process and return what it prints."""
    words = shlex.split(line)
    assert words[:2] == ["python", "-c"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(words[2], "one-liner", "exec"), {})
    return said.getvalue()


def line_with(*parts: str) -> str:
    (found,) = [line for line in LINES if all(part in line for part in parts)]
    return found


def test_pandas_and_polars_read_the_trials(folder: Path) -> None:
    assert re.search(r"asha +2\.0 +0\.2653", run_line(line_with("pandas")))
    said = run_line(line_with("polars"))
    order = re.findall(r"│ (\d) +┆ (\w+) +┆ (\S+)", said)
    assert [(int(trial), reason) for trial, reason, _ in order] == [
        (0, "finished"), (2, "asha"), (1, "asha"), (3, "error")
    ]  # fmt: skip


def test_duckdb_reads_the_tables(folder: Path) -> None:
    said = run_line(line_with("duckdb", "trials.parquet"))
    assert re.search(r"finished +│ +1 +│ +12 +│ +0\.46", said)
    assert re.search(r"asha +│ +2 +│ +6 +│ +0\.31", said)
    assert re.search(r"0 +│ +2 +│ +0\.2", run_line(line_with("duckdb", "curves.parquet")))
    duckdb = importlib.import_module("duckdb")
    assert duckdb.sql('SELECT "config/depth" FROM \'trials.parquet\' ORDER BY trial').fetchall() == [
        (7,), (5,), (5,), (9,)
    ]  # fmt: skip


def test_the_model_opens_with_timm_and_with_safetensors_alone(folder: Path) -> None:
    model = create_nkat_vit(config(), num_classes=10)
    assert run_line(line_with("timm")).strip() == "[0.25, 0.5, 0.75]"
    parameters = sum(tensor.numel() for tensor in model.state_dict().values())
    assert int(run_line(line_with("safetensors"))) == parameters
    code = (
        "import sys; from safetensors.numpy import load_file; tensors = load_file('best/model.safetensors'); "
        "assert not {'torch', 'timm', 'nkat_ray'} & set(sys.modules); print(tensors['head.weight'].sum())"
    )
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import timm

    loaded = timm.create_model("local-dir:best", pretrained=True)
    assert float(alone.stdout) == pytest.approx(float(loaded.state_dict()["head.weight"].sum()), abs=1e-5)
    assert np.isfinite(loaded.eval()(torch.zeros(1, 3, 32, 32)).detach().numpy()).all()


@contextlib.contextmanager
def dashboard(journal: Path) -> Iterator[str]:
    """Start optuna-dashboard on localhost at a free port; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("optuna-dashboard")
    command = [program, journal, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                read(f"{url}/api/studies")
                break
            assert process.poll() is None, "optuna-dashboard has gone"
            assert time.monotonic() < end, "optuna-dashboard does not answer"
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=20)


def read(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_optuna_dashboard_shows_the_study_of_a_run(tmp_path: Path, tiny_run: Any) -> None:
    from nkat_ray.record.journal import Journal
    from nkat_ray.record.run import Run
    from nkat_ray.record.storage import RunStorage
    from nkat_ray.search.searcher import STUDY_NAME, GatedOptunaSearch
    from nkat_ray.space import space_of

    run, journal = tiny_run(space="round2", num_samples=3), Journal(tmp_path)
    journal.write("run")
    run = dataclasses.replace(run, gate=0.3)
    searcher = GatedOptunaSearch(
        Run(
            config=run, domains=space_of(run).domains, datasets={}, storage=RunStorage(tmp_path, None), journal=journal
        )
    )  # fmt: skip
    for number, (reason, score) in enumerate([("finished", 0.4), ("asha", 0.2), ("nan", None)]):
        searcher.suggest(str(number))
        journal.write("started", trial=number, trial_id=str(number))
        row = {"epoch": 1, "local_tpe": float("nan") if score is None else score}
        journal.write("result", trial=number, row=row, checkpoint=None)
        journal.write("end", trial=number, stop_reason=reason, stop_detail=None, error=None)
        searcher.tell(journal.state.trials[number])
    with dashboard(tmp_path / STUDY_FILE) as url:
        (study,) = read(f"{url}/api/studies")["study_summaries"]
        assert study["study_name"] == STUDY_NAME
        trials = read(f"{url}/api/studies/{study['study_id']}")["trials"]
    assert [trial["state"] for trial in trials] == ["Complete", "Pruned", "Fail"]
    assert trials[0]["values"] == [0.4]
    assert {p["name"]: p["param_external_value"] for p in trials[1]["params"]}.keys() == space_of(run).domains.keys()
