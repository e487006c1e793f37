"""The event files, read back with TensorBoard's own readers and its HParams plugin."""

import io
import math
import subprocess
import sys
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

from nkat_ray.config import SPACES
from nkat_ray.report import tables
from nkat_ray.report.tensorboard import TensorBoardLog, markdown_table


def log_run(run: Any, folder: Path, space: str = "round2") -> None:
    with TensorBoardLog(folder, SPACES[space]) as log:
        for row in run.trials:
            for result in (point for point in run.curves if point["trial"] == row["trial"]):
                log.on_result(row["trial"], result)
            log.on_trial_end(row["trial"], row)
        log.stage2(run.summary, run.stage2, run.curves)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


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
    assert set(groups) == {f"trial {row['trial']}" for row in run.trials}
    for row in run.trials:
        group = groups[f"trial {row['trial']}"]
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


def test_a_trial_that_is_told_again_after_a_resume_stays_one_session(
    make_run: Callable[..., Any], tmp_path: Path
) -> None:
    run = make_run()
    log_run(run, tmp_path)
    with TensorBoardLog(tmp_path, SPACES["round2"]) as log:
        for row in run.trials:
            log.on_trial_end(row["trial"], row)
    groups = session_groups(tmp_path)
    assert sorted(group.name for group in groups) == [f"trial {row['trial']}" for row in run.trials]
    assert all(len(group.sessions) == 1 for group in groups)


def test_parameters_that_may_be_off_are_text(make_run: Callable[..., Any], tmp_path: Path) -> None:
    run = make_run()
    run.trials[0]["config/top_k"] = None
    log_run(run, tmp_path / "tb", space="extended")
    groups = {group.name: group for group in session_groups(tmp_path / "tb")}
    assert groups["trial 0"].hparams["top_k"].string_value == "off"
    assert groups["trial 1"].hparams["top_k"].string_value == "6"
    assert groups["trial 1"].hparams["split_heads"].bool_value is False
    assert groups["trial 1"].hparams["lr"].number_value == 2e-4


def test_scalars_have_short_names_and_epochs_as_steps(make_run: Callable[..., Any], tmp_path: Path) -> None:
    run = make_run()
    log_run(run, tmp_path / "tb")
    for tag, key in [("val/accuracy", "val_accuracy"), ("train/loss", "train_loss"), ("lr", "lr")]:
        mine = [(row["epoch"], row[key]) for row in run.curves if row["trial"] == 0]
        assert scalars(tmp_path / "tb" / "trial_0000", tag) == [(step, pytest.approx(value)) for step, value in mine]
    diverged = scalars(tmp_path / "tb" / "trial_0003", "val/local_tpe")
    assert math.isnan(diverged[-1][1])


def test_missing_values_and_extra_scalars(tmp_path: Path) -> None:
    with TensorBoardLog(tmp_path) as log:
        log.on_result(0, {"epoch": 1, "val_accuracy": None, "attention/entropy/block_3": 0.5, "a/text": "x"})
        log.on_trial_end(0, {"trial": 0, "stop_reason": None})
    events = EventAccumulator(str(tmp_path / "trial_0000")).Reload()
    assert events.Tags()["scalars"] == ["attention/entropy/block_3"]


def test_resume_takes_back_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "trial_0000"
    for first, last, value in [
        (1, 5, 0.1),
        (4, 6, 0.2),
    ]:  # killed after epoch 5, resumed from the checkpoint of epoch 3
        with TensorBoardLog(tmp_path) as log:
            for epoch in range(first, last + 1):
                log.on_result(0, {"epoch": epoch, "val_accuracy": value})
            if last == 6:
                for epoch in (5, 6, 7):  # a fault in the same process: back to the checkpoint of epoch 4
                    log.on_result(0, {"epoch": epoch, "val_accuracy": 0.3})
                log.on_trial_end(0, {"trial": 0, "stop_reason": "finished", "best_local_tpe": 0.3})
    expected = [(1, 0.1), (2, 0.1), (3, 0.1), (4, 0.2), (5, 0.3), (6, 0.3), (7, 0.3)]
    assert scalars(folder, "val/accuracy") == [(step, pytest.approx(value)) for step, value in expected]
    assert len(session_groups(tmp_path)) == 1


def test_stage2_run_holds_the_table_and_the_comparison(make_run: Callable[..., Any], tmp_path: Path) -> None:
    run = make_run()
    log_run(run, tmp_path)
    with TensorBoardLog(tmp_path) as log:  # a finished run that is reported again
        log.stage2(run.summary, run.stage2, run.curves)
    events = EventAccumulator(str(tmp_path / "stage2")).Reload()
    (text,) = events.Tensors("scores")
    assert text.tensor_proto.string_val[0].decode() == markdown_table(run.stage2, 0)
    assert "| Global TPE (4 of 4) | 0.53 | 0.619 | >= 0.70 | -0.081 |" in markdown_table(run.stage2, 0)
    assert scalars(tmp_path / "compare" / "gate", "compare/local_tpe") == [
        (n, pytest.approx(0.42)) for n in range(1, 13)
    ]
    winner = [(row["epoch"], pytest.approx(row["local_tpe"])) for row in run.curves if row["trial"] == 0]
    assert scalars(tmp_path / "compare" / "winner", "compare/local_tpe") == winner
    assert events.Scalars("accuracy/mnist")[0].value == pytest.approx(0.985)
    (image,) = events.Images("datasets")
    assert image.encoded_image_string.startswith(b"\x89PNG")


def test_why_a_trial_stopped_is_text_whatever_it_says(tmp_path: Path) -> None:
    with TensorBoardLog(tmp_path) as log:
        log.on_trial_end(0, {"trial": 0, "stop_reason": "error", "error": "Bad`<script>\n` | x"})
        log.on_trial_end(1, {"trial": 1, "stop_reason": "asha", "stop_detail": "epoch 3: not among the best"})
    said = [EventAccumulator(str(tmp_path / f"trial_000{n}")).Reload().Tensors("stop_detail")[0] for n in (0, 1)]
    assert [event.tensor_proto.string_val[0].decode() for event in said] == [
        "**error**: `Bad'<script> ' | x`",  # one line, and inside its code span
        "**asha**: `epoch 3: not among the best`",
    ]


def test_pictures_are_written_anew_each_time(make_run: Callable[..., Any], tmp_path: Path) -> None:
    run, colour = make_run(), {"blue": (0, 0, 255), "red": (255, 0, 0)}
    with TensorBoardLog(tmp_path) as log:
        for name, rgb in colour.items():
            log.samples({"augmented_batch": Image.new("RGB", (8, 4), rgb)})
            log.stage2(run.summary, run.stage2, run.curves, {f"attention/{name}": Image.new("RGB", (2, 2))})
    (event,) = EventAccumulator(str(tmp_path / "samples")).Reload().Images("augmented_batch")
    assert (event.width, event.height) == (8, 4)
    with Image.open(io.BytesIO(event.encoded_image_string)) as shown:
        assert shown.convert("RGB").getpixel((0, 0)) == colour["red"]
    assert EventAccumulator(str(tmp_path / "stage2")).Reload().Tags()["images"] == ["datasets", "attention/red"]


def test_custom_scalars_layout_puts_baseline_winner_and_gate_into_one_chart(tmp_path: Path) -> None:
    TensorBoardLog(tmp_path).close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert layout.category[0].chart[0].multiline.tag[:] == ["^compare/local_tpe$"]


def test_a_run_without_survivors_still_has_its_verdict(make_run: Callable[..., Any], tmp_path: Path) -> None:
    run = make_run(gate=1.0)
    log_run(run, tmp_path)
    events = EventAccumulator(str(tmp_path / "stage2")).Reload()
    assert b"no trial passed" in events.Tensors("verdict")[0].tensor_proto.string_val[0]
    assert len(session_groups(tmp_path)) == len(run.trials)


def test_neither_torch_nor_ray_nor_tensorflow_is_needed() -> None:
    code = "import sys, nkat_ray.report.tensorboard; sys.exit(bool({'torch', 'ray', 'tensorflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
