"""A run as TensorBoard reads it: scalars and HParams for every trial, one run that compares; no TensorFlow, no torch.

Layout: `trial_0003/` for each trial, `stage2/` and `compare/` for the comparison, `samples/` for what training sees,
the folder itself for what HParams and Custom Scalars need to know of all. The event writer is TensorBoard's own; the
few summaries whose builders import TensorFlow are put together from the same protos here.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto import event_pb2, summary_pb2, types_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar_metadata
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util import tensor_util

from nkat_ray.config import SPACES, Choice, Domain
from nkat_ray.metrics import EPOCH, LOCAL_TPE, STAGE2_DATASETS, STOP_REASON, TRAIN_LOSS, VAL_ACCURACY
from nkat_ray.report import attention, results, tables

SCALARS: Final = {
    "val/accuracy": VAL_ACCURACY,
    "val/local_tpe": LOCAL_TPE,
    "train/loss": TRAIN_LOSS,
    "lr": "lr",
    "images_per_s": "images_per_s",
}
STOP_CODE: Final = "hparam/stop_code"  # position in tables.STOP_REASONS; the text is the hyperparameter stop_reason
VAL_GLOBAL_TPE: Final = "hparam/val_global_tpe"
END_METRICS: Final = {
    "hparam/best_local_tpe": "best_local_tpe",
    "hparam/best_val_accuracy": "best_val_accuracy",
    "hparam/lambda_theory": "lambda_theory",
    "hparam/epochs": "epochs",
    "hparam/train_s": "train_s",
}
FAILED: Final = ("nan", "error")
STAGE2_RUN: Final = "stage2"
SAMPLES_RUN: Final = "samples"
COMPARED: Final = "compare/local_tpe"


class TensorBoardLog:
    """Writes a run's event files as it goes on.

    Opening it again on the same folder continues: a trial that goes back to an earlier epoch loses its later points.

    Args:
        folder: where TensorBoard will look (`--logdir`); created at once.
        space: the search space; its parameters are HParams' columns.
    """

    def __init__(self, folder: Path, space: Mapping[str, Domain] = SPACES["round2"]) -> None:
        self._folder = folder
        self._space = space
        self._writers: dict[int, EventFileWriter] = {}
        self._last_epoch: dict[int, int] = {}
        fresh = not any(folder.glob("events.out.tfevents.*"))
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            _write_anew(folder, {0: [_experiment(space), _layout()]})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def on_result(self, trial: int, result: Mapping[str, Any]) -> None:
        """An epoch's scalars at step = epoch; keys with a slash (`attention/entropy/block_3`) pass as they are."""
        epoch = int(result[EPOCH])
        writer = self._writer(trial)
        if epoch <= self._last_epoch.get(trial, epoch):  # a new file, or back to a checkpoint
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            writer.add_event(event_pb2.Event(step=epoch, wall_time=time.time(), session_log=start))
        self._last_epoch[trial] = epoch
        named = {tag: result.get(key) for tag, key in SCALARS.items()}
        passed_on = {key: value for key, value in result.items() if "/" in key and isinstance(value, int | float)}
        _add(writer, _scalars({**named, **passed_on}, keep_nan=True), step=epoch)
        writer.flush()

    def on_trial_end(self, trial: int, row: Mapping[str, Any]) -> None:
        """A trial's HParams session, however it ended: its row of trials.parquet."""
        writer = self._writer(trial)
        reason = row.get(STOP_REASON)
        code = tables.STOP_REASONS.index(reason) if reason in tables.STOP_REASONS else None
        status = api_pb2.STATUS_FAILURE if reason in FAILED else api_pb2.STATUS_SUCCESS
        _add(writer, [_session_start(trial, self._hparams(row), row), _session_end(status)])
        if detail := row.get("stop_detail") or row.get("error"):
            _add(writer, [_text("stop_detail", f"**{reason}**: `{_one_line(detail)}`")])
        _add(writer, _scalars({STOP_CODE: code, **{tag: row.get(key) for tag, key in END_METRICS.items()}}))
        writer.close()
        del self._writers[trial]
        self._last_epoch.pop(trial, None)

    def samples(self, pictures: Mapping[str, Image.Image]) -> None:
        """What training sees, as pictures by tag; written anew each time."""
        _write_anew(self._folder / SAMPLES_RUN, {0: [_image(tag, picture) for tag, picture in pictures.items()]})

    def stage2(
        self,
        summary: Mapping[str, Any],
        stage2: Sequence[Mapping[str, Any]],
        curves: Sequence[Mapping[str, Any]] = (),
        pictures: Mapping[str, Image.Image] | None = None,
    ) -> None:
        """The comparison after Stage 2, in a run of its own; written anew each time.

        Args:
            summary: summary.json's keys.
            stage2: rows of stage2.parquet.
            curves: rows of curves.parquet, for the chart of baseline, winner and gate.
            pictures: of the winner, by tag.
        """
        for trial in sorted({row["trial"] for row in stage2}):
            self._survivor(trial, stage2)
        winner = summary["winner"]["trial"] if summary.get("winner") else None
        values = [
            _text("verdict", results.verdict_of(summary, stage2).sentence),
            _text("scores", markdown_table(stage2, winner)),
        ]
        if notices := results.notices(summary):
            values.append(_text("notice", "\n\n".join(f"**{notice}**" for notice in notices)))
        if winner is not None:
            values += _winner_values(stage2, winner)
        values += [_image(tag, picture) for tag, picture in (pictures or {}).items()]
        _write_anew(self._folder / STAGE2_RUN, {0: values})
        for name, points in _comparison(curves, winner, summary["gate"]).items():
            if points:
                steps = {epoch: _scalars({COMPARED: value}, keep_nan=True) for epoch, value in points.items()}
                _write_anew(self._folder / "compare" / name, steps)

    def close(self) -> None:
        """Write out and close what is open; trials that have not ended have no HParams session yet."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer(self, trial: int) -> EventFileWriter:
        if trial not in self._writers:
            self._writers[trial] = EventFileWriter(str(self._folder / f"trial_{trial:04}"))
        return self._writers[trial]

    def _survivor(self, trial: int, stage2: Sequence[Mapping[str, Any]]) -> None:
        rows = results.of_trial(stage2, trial)
        points: dict[str, Any] = {VAL_GLOBAL_TPE: results.validation_scores(stage2, trial).global_tpe}
        for name, row in rows.items():
            points |= {f"stage2/val_tpe/{name}": row["val_tpe"], f"stage2/test_accuracy/{name}": row["test_accuracy"]}
        writer = EventFileWriter(str(self._folder / f"trial_{trial:04}"))
        _add(writer, _scalars(points))
        writer.close()

    def _hparams(self, row: Mapping[str, Any]) -> dict[str, bool | float | str]:
        found: dict[str, bool | float | str] = {STOP_REASON: row.get(STOP_REASON) or "running"}
        for name, domain in self._space.items():
            value = row.get(tables.CONFIG_PREFIX + name)
            if _dtype(domain) == api_pb2.DATA_TYPE_STRING:
                found[name] = "off" if value is None else str(value)
            elif value is not None:
                found[name] = value
        return found


def markdown_table(stage2: Iterable[Mapping[str, Any]], winner: int | None) -> str:
    """The table metric | now | target | gap, and the datasets below it, in Markdown."""
    stage2 = list(stage2)
    counted = results.datasets_counted(stage2, winner)
    lines = ["| metric | before | now | target | gap |", "|---|---|---|---|---|"]
    for line in results.scorecard(stage2, winner):
        now, gap = ("-", "-") if math.isnan(line.now) else (f"{line.now:.3f}", f"{line.gap:+.3f}")
        name = f"{results.METRIC_NAMES[line.metric]} ({counted} of {len(STAGE2_DATASETS)})"
        lines.append(f"| {name} | {line.before:.2f} | {now} | >= {line.target:.2f} | {gap} |")
    if winner is None:
        return "\n".join(lines)
    lines += ["", "| dataset | status | test accuracy | target | TPE | target |", "|---|---|---|---|---|---|"]
    rows = results.of_trial(stage2, winner)
    for name in STAGE2_DATASETS:
        row = rows.get(name, {})
        accuracy, tpe = (("-" if row.get(key) is None else f"{row[key]:.3f}") for key in ("test_accuracy", "tpe"))
        wanted, wanted_tpe = results.dataset_targets(name)
        title, status = results.DATASET_NAMES[name], row.get("status", "missing")
        lines.append(f"| {title} | {status} | {accuracy} | {wanted:.2f} | {tpe} | {wanted_tpe:.2f} |")
    return "\n".join(lines)


def _winner_values(stage2: Sequence[Mapping[str, Any]], winner: int) -> list[Any]:
    scores = {line.metric: line.now for line in results.scorecard(stage2, winner)}
    points: dict[str, Any] = {f"result/{metric}": value for metric, value in scores.items()}
    for name, row in results.of_trial(stage2, winner).items():
        points |= {f"accuracy/{name}": row["test_accuracy"], f"tpe/{name}": row["tpe"]}
        accuracy, tpe = results.dataset_targets(name)
        points |= {f"accuracy_target/{name}": accuracy, f"tpe_target/{name}": tpe}
    return [*_scalars(points), _image("datasets", _bars(stage2, winner))]


def _comparison(curves: Iterable[Mapping[str, Any]], winner: int | None, gate: float) -> dict[str, dict[int, float]]:
    """Local TPE by epoch of the baseline (trial 0) and the winner, and the gate: a run each, so a colour each."""
    lines: dict[str, dict[int, float]] = {"baseline": {}, "winner": {}}
    for row in curves:
        for name, trial in (("baseline", 0), ("winner", winner)):
            if row["trial"] == trial:
                lines[name][row[EPOCH]] = row[LOCAL_TPE]
    epochs = sorted({epoch for points in lines.values() for epoch in points})
    return {**lines, "gate": dict.fromkeys(epochs, gate)}


def _bars(stage2: Sequence[Mapping[str, Any]], winner: int) -> Image.Image:
    """Test accuracy of the four datasets as bars, each target as a black line across its bar."""
    width, height, left, top, step = 640, 300, 150, 50, 60
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(16)
    draw.text((10, 12), f"Trial {winner}: test accuracy (bar) and target (line)", "black", font)
    rows = results.of_trial(stage2, winner)
    for n, name in enumerate(STAGE2_DATASETS):
        y, scale = top + n * step, width - left - 90
        accuracy, (target, _) = rows.get(name, {}).get("test_accuracy"), results.dataset_targets(name)
        draw.text((10, y + 8), results.DATASET_NAMES[name], "black", font)
        if accuracy is not None:
            draw.rectangle((left, y, left + accuracy * scale, y + 34), fill="#0072B2")
        draw.text((width - 80, y + 8), "missing" if accuracy is None else f"{accuracy:.3f}", "black", font)
        x = left + (target or 0) * scale
        draw.line((x, y - 5, x, y + 39), "black", 3)
    return picture


# --- protos -----------------------------------------------------------------------------------------------------------


def _add(writer: EventFileWriter, values: Sequence[Any], step: int = 0) -> None:
    if values:
        summary = summary_pb2.Summary(value=values)
        writer.add_event(event_pb2.Event(step=step, wall_time=time.time(), summary=summary))


def _write_anew(folder: Path, steps: Mapping[int, Sequence[Any]]) -> None:
    """A run's values by step, in place of what an earlier report wrote there."""
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    writer = EventFileWriter(str(folder))
    for step, values in sorted(steps.items()):
        _add(writer, values, step=step)
    writer.close()


def _scalars(points: Mapping[str, Any], *, keep_nan: bool = False) -> list[Any]:
    """Summary values; None is left out, and NaN unless it is a point of a curve, where TensorBoard marks it."""
    shown = {tag: float(value) for tag, value in points.items() if value is not None}
    return [
        summary_pb2.Summary.Value(tag=tag, simple_value=value)
        for tag, value in shown.items()
        if keep_nan or math.isfinite(value)
    ]


def _text(tag: str, content: str) -> Any:
    tensor = tensor_util.make_tensor_proto([content.encode()], dtype=types_pb2.DT_STRING)
    metadata = text_metadata.create_summary_metadata(display_name="", description="")
    return summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)


def _one_line(text: object) -> str:
    """Data inside a Markdown code span."""
    return " ".join(str(text).split()).replace("`", "'")


def _image(tag: str, picture: Image.Image) -> Any:
    image = summary_pb2.Summary.Image(
        height=picture.height, width=picture.width, colorspace=3, encoded_image_string=attention.png(picture)
    )
    return summary_pb2.Summary.Value(tag=tag, image=image)


def _layout() -> Any:
    """Custom Scalars' page: baseline, winner and gate in one chart, then every trial."""

    def chart(title: str, tag: str) -> Any:
        return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[tag]))

    layout = layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title="Stage 1",
                chart=[
                    chart("Local TPE: baseline, winner and gate", f"^{COMPARED}$"),
                    chart("Local TPE of every trial", r"^val/local_tpe$"),
                    chart("Validation accuracy of every trial", r"^val/accuracy$"),
                    chart("Training loss of every trial", r"^train/loss$"),
                ],
            )
        ]
    )
    return summary_pb2.Summary.Value(
        tag=custom_scalar_metadata.CONFIG_SUMMARY_TAG,
        metadata=custom_scalar_metadata.create_summary_metadata(),
        tensor=tensor_util.make_tensor_proto(layout.SerializeToString(), dtype=types_pb2.DT_STRING),
    )


def _dtype(domain: Domain) -> int:
    """HParams' type of a parameter. No values are declared: HParams would hide an enqueued trial from outside them."""
    if not isinstance(domain, Choice):
        return int(api_pb2.DATA_TYPE_FLOAT64)
    if all(isinstance(value, bool) for value in domain.values):
        return int(api_pb2.DATA_TYPE_BOOL)
    numbers = all(isinstance(value, int | float) for value in domain.values)
    return int(api_pb2.DATA_TYPE_FLOAT64 if numbers else api_pb2.DATA_TYPE_STRING)


def _experiment(space: Mapping[str, Domain]) -> Any:
    hparams = [api_pb2.HParamInfo(name=STOP_REASON, type=api_pb2.DATA_TYPE_STRING)]
    hparams += [api_pb2.HParamInfo(name=name, type=_dtype(domain)) for name, domain in space.items()]
    tags = [VAL_GLOBAL_TPE, *END_METRICS, STOP_CODE]
    metrics = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=tag.removeprefix("hparam/")) for tag in tags
    ]
    codes = ", ".join(f"{code} {reason}" for code, reason in enumerate(tables.STOP_REASONS))
    experiment = api_pb2.Experiment(
        hparam_infos=hparams, metric_infos=metrics, description=f"stop_code: {codes}", time_created_secs=time.time()
    )
    return _hparams_value(hparams_metadata.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(experiment=experiment))


def _session_start(trial: int, hparams: Mapping[str, bool | float | str], row: Mapping[str, Any]) -> Any:
    info = plugin_data_pb2.SessionStartInfo(
        group_name=f"trial {trial}", start_time_secs=time.time() - (row.get("wall_s") or 0.0)
    )
    for name, value in hparams.items():
        kind = "bool_value" if isinstance(value, bool) else "string_value" if isinstance(value, str) else "number_value"
        setattr(info.hparams[name], kind, value)
    data = plugin_data_pb2.HParamsPluginData(session_start_info=info)
    return _hparams_value(hparams_metadata.SESSION_START_INFO_TAG, data)


def _session_end(status: int) -> Any:
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    data = plugin_data_pb2.HParamsPluginData(session_end_info=info)
    return _hparams_value(hparams_metadata.SESSION_END_INFO_TAG, data)


def _hparams_value(tag: str, data: Any) -> Any:
    metadata = hparams_metadata.create_summary_metadata(data)
    return summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=hparams_metadata.NULL_TENSOR)
