"""The event files, read back with TensorBoard's own readers and its HParams plugin."""

import io
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.data.provider import ListHyperparametersResult
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from nkat_ray.record import tables
from nkat_ray.report.tensorboard import TensorBoardLog, markdown_table
from nkat_ray.space import SPACES


def log_run(run: Any, folder: Path, space: str = "round2") -> None:
    with TensorBoardLog(folder, SPACES[space]) as log:
        for row in run.trials:
            log.on_trial_start(row["trial"], tables.config_of(row))
            for result in (point for point in run.curves if point["trial"] == row["trial"]):
                log.on_epoch(row["trial"], result)
            log.on_trial_end(row["trial"], row)
        log.stage2(run.summary, run.stage2, run.curves)


def trial_folder(folder: Path, trial: int) -> Path:
    (found,) = folder.glob(f"trial_{trial:04} *")
    return found


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def text_of(events: EventAccumulator, tag: str) -> list[str]:
    """What TEXT shows under a tag, to which torch's writer adds a suffix."""
    return [event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")]


def session_groups(folder: Path) -> list[Any]:
    """What the HPARAMS page would list: TensorBoard's plugin asked through its own handler."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = backend_context.Context(TBContext(data_provider=provider, logdir=str(folder)))
    request = RequestContext()
    experiment = context.experiment_from_metadata(
        request, "", True, context.hparams_metadata(request, ""), ListHyperparametersResult([], [])
    )
    columns = [api_pb2.ColParams(hparam=info.name) for info in experiment.hparam_infos]
    columns += [api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos]
    wanted = api_pb2.ListSessionGroupsRequest(
        start_index=0,
        slice_size=1000,
        allowed_statuses=list(api_pb2.Status.values()),
        aggregation_type=api_pb2.AGGREGATION_AVG,
        col_params=columns,
    )
    return list(list_session_groups.Handler(request, context, "", wanted).run().session_groups)


def test_every_trial_is_an_hparams_session_with_its_values(make_run: Callable[..., Any], tmp_path: Path) -> None:
    run = make_run()
    log_run(run, tmp_path / "tb")
    groups = {group.name: group for group in session_groups(tmp_path / "tb")}
    assert len(groups) == len(run.trials)
    assert {"trial_0000 tiny p2 384x7", "trial_0001 no stem p4 384x5"} < set(groups)
    for row in run.trials:
        group = groups[trial_folder(tmp_path / "tb", row["trial"]).name]
        assert group.hparams["stop_reason"].string_value == row["stop_reason"]
        assert group.hparams["conv_stem"].string_value == row["config/conv_stem"]
        for name in ("patch_size", "embed_dim", "depth", "temperature", "top_p"):
            assert group.hparams[name].number_value == row[f"config/{name}"]
        metrics = {value.name.tag.removeprefix("hparam/"): value.value for value in group.metric_values}
        assert tables.STOP_REASONS[int(metrics["stop_code"])] == row["stop_reason"]
        assert metrics.get("best_local_tpe") == pytest.approx(row["best_local_tpe"])
        assert ("val_global_tpe" in metrics) == row["passed_gate"]
        (session,) = group.sessions
        failed = row["stop_reason"] in ("nan", "error")
        assert session.status == (api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS)


def test_a_trial_reported_again_after_a_resume_is_not_written_again(
    make_run: Callable[..., Any], tmp_path: Path
) -> None:
    run = make_run()
    log_run(run, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*tfevents*")}
    with TensorBoardLog(tmp_path, SPACES["round2"]) as log:
        for row in run.trials:
            log.on_trial_end(row["trial"], row)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*tfevents*")} == before
    groups = session_groups(tmp_path)
    assert len(groups) == len(run.trials)
    assert all(len(group.sessions) == 1 for group in groups)


def next_second() -> None:
    """Let the next driver begin: files of one process and second are read by a counter's digits, 100 before 99."""
    time.sleep(1)


def test_a_trial_that_goes_on_after_a_resume_keeps_its_folder(tmp_path: Path) -> None:
    for trial in (1, 10001):
        with TensorBoardLog(tmp_path) as log:
            log.on_trial_start(trial, {"depth": 5, "conv_stem": "small"})
            log.on_epoch(trial, {"epoch": 1, "val_accuracy": 0.1})
    next_second()
    with TensorBoardLog(tmp_path) as log:  # nobody says its parameters
        log.on_epoch(1, {"epoch": 2, "val_accuracy": 0.2})
    assert [folder.name for folder in sorted(tmp_path.glob("trial_*"))] == [
        "trial_0001 small p2 384x5", "trial_10001 small p2 384x5",
    ]  # fmt: skip
    assert [step for step, _ in scalars(trial_folder(tmp_path, 1), "curves/val_accuracy")] == [1, 2]


def test_trials_of_several_runs_are_never_averaged(make_run: Callable[..., Any], tmp_path: Path) -> None:
    runs = {name: make_run(name, gate=gate) for name, gate in {"first": 0.42, "second": 1.0}.items()}
    for name, run in runs.items():
        log_run(run, tmp_path / "all" / name / "tensorboard")
    groups = {group.name: group for group in session_groups(tmp_path / "all")}
    assert len(groups) == sum(len(run.trials) for run in runs.values())
    for name, run in runs.items():
        for row in run.trials:
            folder = trial_folder(tmp_path / "all" / name / "tensorboard", row["trial"])
            group = groups[str(folder.relative_to(tmp_path / "all"))]
            assert len(group.sessions) == 1
            assert group.hparams["run"].string_value == name
            metrics = {value.name.tag.removeprefix("hparam/"): value.value for value in group.metric_values}
            assert ("val_global_tpe" in metrics) == row["passed_gate"]  # the same trials, but another gate


def test_parameters_that_may_be_off_are_text(make_run: Callable[..., Any], tmp_path: Path) -> None:
    run = make_run()
    run.trials[0]["config/top_k"] = None
    log_run(run, tmp_path / "tb", space="extended")
    groups = {group.name: group for group in session_groups(tmp_path / "tb")}
    assert groups["trial_0000 tiny p2 384x7"].hparams["top_k"].string_value == "off"
    assert groups["trial_0001 no stem p4 384x5"].hparams["top_k"].string_value == "6"
    assert groups["trial_0001 no stem p4 384x5"].hparams["split_heads"].bool_value is False
    assert groups["trial_0001 no stem p4 384x5"].hparams["lr"].number_value == 2e-4


def test_scalars_have_short_names_and_epochs_as_steps(make_run: Callable[..., Any], tmp_path: Path) -> None:
    run = make_run()
    log_run(run, tmp_path / "tb")
    shown = [("curves/val_accuracy", "val_accuracy"), ("curves/train_loss", "train_loss"), ("training/lr", "lr")]
    for tag, key in shown:
        mine = [(row["epoch"], row[key]) for row in run.curves if row["trial"] == 0]
        assert scalars(trial_folder(tmp_path / "tb", 0), tag) == [(step, pytest.approx(value)) for step, value in mine]
    diverged = scalars(trial_folder(tmp_path / "tb", 3), "curves/local_tpe")
    assert math.isnan(diverged[-1][1])


def test_curves_come_first_and_stage2_adds_no_single_points(make_run: Callable[..., Any], tmp_path: Path) -> None:
    run = make_run()
    with TensorBoardLog(tmp_path) as log:
        log.on_epoch(0, {**run.curves[0], "attention/entropy/block_3": 0.5, "nkat/alpha/block_0": 0.1})
        log.on_trial_end(0, run.trials[0])
        log.stage2(run.summary, run.stage2, run.curves)
    tags = sorted(EventAccumulator(str(trial_folder(tmp_path, 0))).Reload().Tags()["scalars"])
    assert tags[:3] == ["curves/local_tpe", "curves/train_loss", "curves/val_accuracy"]
    assert tags[-4:-2] == ["layers/attention/entropy/block_3", "layers/nkat/alpha/block_0"]
    assert [tag for tag in tags if "stage2" in tag or "test" in tag] == []
    assert EventAccumulator(str(tmp_path / "stage2")).Reload().Tags()["scalars"] == []


def test_missing_values_and_extra_scalars(tmp_path: Path) -> None:
    with TensorBoardLog(tmp_path) as log:
        log.on_epoch(0, {"epoch": 1, "val_accuracy": None, "attention/entropy/block_3": 0.5, "a/text": "x"})
        log.on_trial_end(0, {"trial": 0, "stop_reason": None})
    events = EventAccumulator(str(trial_folder(tmp_path, 0))).Reload()
    assert events.Tags()["scalars"] == ["layers/attention/entropy/block_3"]


def test_resume_takes_back_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    for first, last, value in [
        (1, 5, 0.1),
        (4, 6, 0.2),
    ]:  # killed after epoch 5, resumed from the checkpoint of epoch 3
        with TensorBoardLog(tmp_path) as log:
            for epoch in range(first, last + 1):
                log.on_epoch(0, {"epoch": epoch, "val_accuracy": value})
            if last == 6:
                for epoch in (5, 6, 7):  # a fault in the same process: back to the checkpoint of epoch 4
                    log.on_epoch(0, {"epoch": epoch, "val_accuracy": 0.3})
                log.on_trial_end(0, {"trial": 0, "stop_reason": "finished", "best_local_tpe": 0.3})
        next_second()
    expected = [(1, 0.1), (2, 0.1), (3, 0.1), (4, 0.2), (5, 0.3), (6, 0.3), (7, 0.3)]
    assert scalars(trial_folder(tmp_path, 0), "curves/val_accuracy") == [
        (step, pytest.approx(value)) for step, value in expected
    ]
    assert len(session_groups(tmp_path)) == 1


def test_stage2_run_holds_the_table_and_the_comparison(make_run: Callable[..., Any], tmp_path: Path) -> None:
    run = make_run()
    log_run(run, tmp_path)
    with TensorBoardLog(tmp_path) as log:  # a finished run that is reported again
        log.stage2(run.summary, run.stage2, run.curves)
    events = EventAccumulator(str(tmp_path / "stage2")).Reload()
    (text,) = text_of(events, "scores")
    assert text == markdown_table(run.stage2, 0)
    assert "| Global TPE (4 of 4) | 0.53 | 0.619 | >= 0.70 | -0.081 |" in markdown_table(run.stage2, 0)
    assert scalars(tmp_path / "compare" / "gate", "compare/local_tpe") == [
        (n, pytest.approx(0.42)) for n in range(1, 13)
    ]
    winner = [(row["epoch"], pytest.approx(row["local_tpe"])) for row in run.curves if row["trial"] == 0]
    assert scalars(tmp_path / "compare" / "winner", "compare/local_tpe") == winner
    (survivors,) = text_of(events, "survivors")
    assert [line.split(" | ")[0] for line in survivors.splitlines()[2:]] == ["| 0", "| 7", "| 5"]  # best first
    assert "| 0 | 0.619 | 0.985 / 0.985 |" in survivors


def test_why_a_trial_stopped_is_text_whatever_it_says(tmp_path: Path) -> None:
    with TensorBoardLog(tmp_path) as log:
        log.on_trial_end(0, {"trial": 0, "stop_reason": "error", "error": "Bad`<script>\n` | x"})
        log.on_trial_end(1, {"trial": 1, "stop_reason": "asha", "stop_detail": "epoch 3: not among the best"})
    events = [EventAccumulator(str(trial_folder(tmp_path, n))).Reload() for n in (0, 1)]
    assert [text_of(found, "stop_detail") for found in events] == [
        ["**error**: `' | x`"],  # the error's last line, inside its code span
        ["**asha**: `epoch 3: not among the best`"],
    ]


def test_pictures_are_replaced_each_time(make_run: Callable[..., Any], tmp_path: Path) -> None:
    run, colour = make_run(), {"blue": (0, 0, 255), "red": (255, 0, 0)}
    with TensorBoardLog(tmp_path) as log:
        for name, rgb in colour.items():
            log.samples({"augmented_batch": Image.new("RGB", (8, 4), rgb)})
            log.stage2(run.summary, run.stage2, run.curves, {f"attention/{name}": Image.new("RGB", (2, 2))})
    (event,) = EventAccumulator(str(tmp_path / "samples")).Reload().Images("pictures/augmented_batch")
    assert (event.width, event.height) == (8, 4)
    with Image.open(io.BytesIO(event.encoded_image_string)) as shown:
        assert shown.convert("RGB").getpixel((0, 0)) == colour["red"]
    tags = EventAccumulator(str(tmp_path / "stage2")).Reload().Tags()["images"]
    assert tags == ["pictures/attention/red"]


def test_custom_scalars_layout_puts_baseline_winner_and_gate_into_one_chart(tmp_path: Path) -> None:
    TensorBoardLog(tmp_path).close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert layout.category[0].chart[0].multiline.tag[:] == ["^compare/local_tpe$"]


# Reported in EleutherAI/lm-evaluation-harness#1112
def test_a_dataset_of_ones_own_is_shown_and_one_that_was_not_asked_for_is_not(make_run: Callable[..., Any]) -> None:
    run = make_run()
    rows = [{**row, "dataset": {"mnist": "leaves"}.get(row["dataset"], row["dataset"])} for row in run.stage2]
    shown = markdown_table(rows, 0, ["cifar10", "leaves"])
    assert "| leaves | ok | 0.985 | - | 0.723 | - |" in shown
    assert "| CIFAR-10 | ok | 0.618 | 0.60 |" in shown
    assert "MNIST" not in shown
    assert "missing" not in shown


def test_a_run_without_survivors_still_has_its_verdict(make_run: Callable[..., Any], tmp_path: Path) -> None:
    run = make_run(gate=1.0)
    log_run(run, tmp_path)
    events = EventAccumulator(str(tmp_path / "stage2")).Reload()
    assert "no trial passed" in text_of(events, "verdict")[0]
    assert len(session_groups(tmp_path)) == len(run.trials)


def test_neither_torch_nor_ray_nor_tensorflow_is_needed() -> None:
    code = "import sys, nkat_ray.report.tensorboard; sys.exit(bool({'torch', 'ray', 'tensorflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
