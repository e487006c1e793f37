"""Write a run's event files for TensorBoard: curves and HParams of every trial, and one comparison after Stage 2.

Below the folder there is one TensorBoard run per trial (`trial_0003 tiny p2 384x7/`), `stage2/` for verdict and
scores, `compare/` for baseline, winner and gate, and `samples/` for what a training sees. The folder itself declares
the columns of HPARAMS and the charts of CUSTOM SCALARS. Files are written by torch's SummaryWriter; only the messages
of HPARAMS are put together here, since no writer can say that a session failed, or when it began.
"""

import contextlib
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata

from nkat_ray.config import TrialConfig
from nkat_ray.errors import one_line
from nkat_ray.files import write_atomically
from nkat_ray.metrics import EPOCH, LOCAL_TPE, STAGE2_DATASETS, STOP_REASON, TRAIN_LOSS, VAL_ACCURACY
from nkat_ray.record import scoring, tables
from nkat_ray.record.observer import Observer
from nkat_ray.record.scoring import dataset_name, datasets_of, number, rows_by_dataset, stage2_status
from nkat_ray.report.wording import design_label
from nkat_ray.space import SPACES, Choice, Domain

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# TensorBoard sorts by name: the curves come first, what belongs to single layers last.
CURVES: Final = {
    "curves/val_accuracy": VAL_ACCURACY,
    "curves/local_tpe": LOCAL_TPE,
    "curves/train_loss": TRAIN_LOSS,
    "training/lr": "lr",
    "training/images_per_s": "images_per_s",
}
LAYERS: Final = "layers/"  # before every key of a row that has a slash: layers/attention/entropy/block_3
PICTURES: Final = "pictures/"  # before every picture's tag
COMPARED: Final = "compare/local_tpe"
RUN: Final = "run"  # hyperparameter with the run's folder, which distinguishes the trials of several runs
STOP_CODE: Final = "hparam/stop_code"  # position in tables.STOP_REASONS; the text is the hyperparameter stop_reason
VAL_GLOBAL_TPE: Final = "hparam/val_global_tpe"
END_METRICS: Final = {
    "hparam/best_local_tpe": "best_local_tpe",
    "hparam/best_val_accuracy": "best_val_accuracy",
    "hparam/lambda_theory": "lambda_theory",
    "hparam/epochs": "epochs",
    "hparam/train_s": "train_s",
}
CHARTS: Final = {
    "Stage 1": {
        "Local TPE: baseline, winner and gate": ["Multiline", [f"^{COMPARED}$"]],
        "Local TPE of every trial": ["Multiline", ["^curves/local_tpe$"]],
        "Validation accuracy of every trial": ["Multiline", ["^curves/val_accuracy$"]],
        "Training loss of every trial": ["Multiline", ["^curves/train_loss$"]],
    }
}
FAILED: Final = ("nan", "error")
STAGE2_RUN: Final = "stage2"
SAMPLES_RUN: Final = "samples"
ENDED: Final = ".ended"  # suffix of the file with a trial's HPARAMS session: it is there once the trial has ended
SCORED: Final = ".scored"  # suffix of the file with a survivor's score of Stage 2


class TensorBoardLog(Observer):
    """Write a run's event files during the run: an observer.

    Opening it again on the same folder continues: what is there is not written a second time, and a trial that goes
    back to an earlier epoch loses its later points.

    Args:
        folder: what TensorBoard reads (`--logdir`); made at once.
        space: the search space; its parameters become the columns of HPARAMS.
    """

    def __init__(
        self, folder: Path, space: Mapping[str, Domain] = SPACES["round2"], base: TrialConfig | None = None
    ) -> None:
        self._folder, self._space = folder, space
        self._base = vars(base or TrialConfig())
        self._folders: dict[int, Path] = {}
        self._writers: dict[int, SummaryWriter] = {}
        self._last_epoch: dict[int, int] = {}
        if not any(folder.glob("events.out.tfevents.*")):
            with _event_file(folder) as writer:
                _file_of(writer).add_summary(_experiment(space))
                writer.add_custom_scalars(CHARTS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_trial_start(self, trial: int, params: Mapping[str, Any]) -> None:
        """Choose the name of the trial's TensorBoard run; `params` are the values that were proposed for the trial."""
        self._folder_of(trial, params)

    def on_epoch(self, trial: int, row: Mapping[str, Any]) -> None:
        """Add an epoch's scalars at step = epoch; NaN is kept, since TensorBoard marks it on a curve."""
        epoch = int(row[EPOCH])
        if trial not in self._writers:
            self._writers[trial] = _open(self._folder_of(trial, {}))
        writer = self._writers[trial]
        if epoch <= self._last_epoch.get(trial, epoch):  # a new file, or back to a checkpoint: later points are void
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            _file_of(writer).add_event(event_pb2.Event(session_log=start), step=epoch)
        self._last_epoch[trial] = epoch
        layers = {LAYERS + key: value for key, value in row.items() if "/" in key and isinstance(value, int | float)}
        for tag, value in {**{tag: row.get(key) for tag, key in CURVES.items()}, **layers}.items():
            if value is not None:
                writer.add_scalar(tag, value, epoch)
        writer.flush()

    def on_stage1_start(self, total: int, ended: Sequence[Mapping[str, Any]]) -> None:
        """Write the sessions of trials that ended under an earlier driver, which may not have written them."""
        for row in ended:
            self.on_trial_end(row["trial"], row)

    def on_trial_end(self, trial: int, row: Mapping[str, Any]) -> None:
        """Write the trial's HPARAMS session and why it stopped, once; `row` is its row of trials.parquet."""
        self._close(trial)
        folder = self._folder_of(trial, tables.config_of(row))
        if any(folder.glob(f"*{ENDED}")):
            return
        reason = row.get(STOP_REASON)
        detail = row.get("stop_detail") or row.get("error")
        code = tables.STOP_REASONS.index(reason) if reason in tables.STOP_REASONS else None
        with _event_file(folder, ENDED) as writer:
            _file_of(writer).add_summary(_session_start(self._hparams(row), row.get("wall_s") or 0.0))
            _file_of(writer).add_summary(_session_end(failed=reason in FAILED))
            if detail:
                writer.add_text("stop_detail", f"**{reason}**: `{one_line(detail).replace('`', chr(39))}`")
            _add_finite(writer, {STOP_CODE: code, **{tag: row.get(key) for tag, key in END_METRICS.items()}})

    def samples(self, pictures: Mapping[str, Image.Image]) -> None:
        """Write the pictures of what a training sees, by tag, in place of earlier ones."""
        with _event_file(self._folder / SAMPLES_RUN) as writer:
            _add_pictures(writer, pictures)

    def stage2(
        self,
        summary: Mapping[str, Any],
        stage2: Sequence[Mapping[str, Any]],
        curves: Sequence[Mapping[str, Any]] = (),
        pictures: Mapping[str, Image.Image] | None = None,
    ) -> None:
        """Write verdict, scores and the chart of baseline, winner and gate, in place of earlier ones."""
        winner = summary["winner"]["trial"] if summary.get("winner") else None
        for trial in sorted({row["trial"] for row in stage2}):
            with _event_file(self._folder_of(trial, {}), SCORED) as writer:
                _add_finite(writer, {VAL_GLOBAL_TPE: scoring.validation_scores(stage2, trial).global_tpe})
        with _event_file(self._folder / STAGE2_RUN) as writer:
            writer.add_text("verdict", scoring.written_verdict(summary).sentence)
            writer.add_text("scores", markdown_table(stage2, winner, datasets_of(summary)))
            if stage2:
                writer.add_text("survivors", _survivors_table(stage2, summary["ranking"], datasets_of(summary)))
            if notices := scoring.notices(summary):
                writer.add_text("notice", "\n\n".join(f"**{notice}**" for notice in notices))
            _add_pictures(writer, pictures or {})
        for name, points in _comparison(curves, winner, summary["gate"]).items():
            with _event_file(self._folder / "compare" / name) as writer:
                for epoch, value in points.items():
                    writer.add_scalar(COMPARED, value, epoch)

    def close(self) -> None:
        """Write out and close the files of trials that have not ended; those have no HPARAMS session yet."""
        for trial in list(self._writers):
            self._close(trial)

    def _close(self, trial: int) -> None:
        writer = self._writers.pop(trial, None)
        if writer is not None:
            writer.close()
        self._last_epoch.pop(trial, None)

    def _folder_of(self, trial: int, config: Mapping[str, Any]) -> Path:
        """Return the folder of a trial: an existing one, else one named after the design."""
        if trial not in self._folders:
            name = f"trial_{trial:04}"
            label = design_label({**self._base, **config})
            earlier = (path for path in self._folder.glob(f"{name}*") if path.name.split(" ")[0] == name)
            self._folders[trial] = next(earlier, self._folder / f"{name} {label}")
        return self._folders[trial]

    def _hparams(self, row: Mapping[str, Any]) -> dict[str, bool | float | str]:
        run = self._folder.absolute().parent.name
        values: dict[str, bool | float | str] = {RUN: run, STOP_REASON: row.get(STOP_REASON) or "running"}
        for name, domain in self._space.items():
            value = row.get(tables.CONFIG_PREFIX + name)
            if _data_type(domain) == api_pb2.DATA_TYPE_STRING:
                values[name] = "off" if value is None else str(value)
            elif value is not None:
                values[name] = value
        return values


def markdown_table(
    stage2: Iterable[Mapping[str, Any]], winner: int | None, datasets: Sequence[str] = STAGE2_DATASETS
) -> str:
    """Return the table metric | before | now | target | gap, and one of the winner's datasets below it, in Markdown.

    Args:
        winner: the best survivor's number; None leaves the second table out.
    """
    stage2 = list(stage2)
    counted = scoring.datasets_counted(stage2, winner)
    lines = ["| metric | before | now | target | gap |", "|---|---|---|---|---|"]
    for line in scoring.scorecard(stage2, winner):
        gap = "-" if math.isnan(line.now) else f"{line.gap:+.3f}"
        name = f"{scoring.METRIC_NAMES[line.metric]} ({counted} of {len(STAGE2_DATASETS)})"
        lines.append(f"| {name} | {line.before:.2f} | {number(line.now)} | >= {line.target:.2f} | {gap} |")
    if winner is None:
        return "\n".join(lines)
    lines += ["", "| dataset | status | test accuracy | target | TPE | target |", "|---|---|---|---|---|---|"]
    rows = rows_by_dataset(stage2, winner)
    for name in datasets:
        row, (wanted, wanted_tpe) = rows.get(name, {}), scoring.dataset_targets(name)
        accuracy, tpe = number(row.get("test_accuracy")), number(row.get("tpe"))
        cells = (dataset_name(name), stage2_status(row), accuracy, number(wanted, 2), tpe, number(wanted_tpe, 2))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _survivors_table(stage2: Sequence[Mapping[str, Any]], ranking: Sequence[int], datasets: Sequence[str]) -> str:
    """Return every survivor's validation and test accuracy per dataset, best survivor first, in Markdown."""
    scores = {trial: scoring.validation_scores(stage2, trial) for trial in {row["trial"] for row in stage2}}
    heads = ["trial", "Global TPE (validation)", *(f"{dataset_name(name)} (validation / test)" for name in datasets)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for trial in ranking or sorted(scores):
        rows = rows_by_dataset(stage2, trial)
        pairs = ((rows.get(name, {}).get(key) for key in ("val_accuracy", "test_accuracy")) for name in datasets)
        cells = [str(trial), number(scores[trial].global_tpe), *(" / ".join(map(number, pair)) for pair in pairs)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _comparison(curves: Iterable[Mapping[str, Any]], winner: int | None, gate: float) -> dict[str, dict[int, float]]:
    """Return Local TPE by epoch of the baseline (trial 0) and the winner, and the gate; empty ones are left out."""
    lines: dict[str, dict[int, float]] = {"baseline": {}, "winner": {}}
    for row in curves:
        for name, trial in (("baseline", 0), ("winner", winner)):
            if row["trial"] == trial:
                lines[name][row[EPOCH]] = row[LOCAL_TPE]
    epochs = sorted({epoch for points in lines.values() for epoch in points})
    return {name: points for name, points in {**lines, "gate": dict.fromkeys(epochs, gate)}.items() if points}


# --- event files ------------------------------------------------------------------------------------------------------


def _open(folder: Path, suffix: str = "") -> "SummaryWriter":
    """Open a new event file in a folder. Torch is imported here, not with this module: it takes seconds."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), filename_suffix=suffix)


def _file_of(writer: "SummaryWriter") -> Any:
    """Return the writer's file, which takes complete messages; torch declares it as None."""
    return writer.file_writer


@contextlib.contextmanager
def _event_file(folder: Path, suffix: str = "") -> Iterator["SummaryWriter"]:
    """Write one event file atomically, in place of earlier ones with the same suffix.

    Raises:
        OSError: the disk is full or not writable; the earlier files stay.
    """
    earlier = list(folder.glob(f"events.out.tfevents.*{suffix}"))
    with tempfile.TemporaryDirectory() as scratch:
        with _open(Path(scratch), suffix) as writer:
            yield writer
        (written,) = Path(scratch).iterdir()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / written.name, written.read_bytes())
    for path in earlier:
        path.unlink()


def _add_finite(writer: "SummaryWriter", points: Mapping[str, Any]) -> None:
    """Add single points, without those that are None or not finite."""
    for tag, value in points.items():
        if value is not None and math.isfinite(value):
            writer.add_scalar(tag, value, 0)


def _add_pictures(writer: "SummaryWriter", pictures: Mapping[str, Image.Image]) -> None:
    for tag, picture in pictures.items():
        writer.add_image(PICTURES + tag, np.asarray(picture.convert("RGB")), 0, dataformats="HWC")


# --- HPARAMS ----------------------------------------------------------------------------------------------------------


def _data_type(domain: Domain) -> int:
    """Return HPARAMS' type of a parameter; a parameter that may be `off` is text.

    No values are declared: HPARAMS would hide an enqueued trial that lies outside them.
    """
    if not isinstance(domain, Choice):
        return int(api_pb2.DATA_TYPE_FLOAT64)
    if all(isinstance(value, bool) for value in domain.values):
        return int(api_pb2.DATA_TYPE_BOOL)
    numbers = all(isinstance(value, int | float) for value in domain.values)
    return int(api_pb2.DATA_TYPE_FLOAT64 if numbers else api_pb2.DATA_TYPE_STRING)


def _experiment(space: Mapping[str, Domain]) -> Any:
    """Return the message that declares the columns of HPARAMS."""
    hparams = [api_pb2.HParamInfo(name=name, type=api_pb2.DATA_TYPE_STRING) for name in (RUN, STOP_REASON)]
    hparams += [api_pb2.HParamInfo(name=name, type=_data_type(domain)) for name, domain in space.items()]
    metrics = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=tag.removeprefix("hparam/"))
        for tag in (VAL_GLOBAL_TPE, *END_METRICS, STOP_CODE)
    ]
    codes = ", ".join(f"{code} {reason}" for code, reason in enumerate(tables.STOP_REASONS))
    experiment = api_pb2.Experiment(
        hparam_infos=hparams, metric_infos=metrics, description=f"stop_code: {codes}", time_created_secs=time.time()
    )
    return _hparams_summary(hparams_metadata.EXPERIMENT_TAG, experiment=experiment)


def _session_start(hparams: Mapping[str, bool | float | str], wall_s: float) -> Any:
    """Return the message with a trial's hyperparameters and its start.

    The session belongs to no group: HPARAMS then lists it by its folder below `--logdir`, so that trials of several
    runs are never averaged.
    """
    info = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time() - wall_s)
    for name, value in hparams.items():
        kind = "bool_value" if isinstance(value, bool) else "string_value" if isinstance(value, str) else "number_value"
        setattr(info.hparams[name], kind, value)
    return _hparams_summary(hparams_metadata.SESSION_START_INFO_TAG, session_start_info=info)


def _session_end(*, failed: bool) -> Any:
    """Return the message that a trial has ended now, and whether it failed."""
    status = api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    return _hparams_summary(hparams_metadata.SESSION_END_INFO_TAG, session_end_info=info)


def _hparams_summary(tag: str, **message: Any) -> Any:
    metadata = hparams_metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**message))
    value = summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=hparams_metadata.NULL_TENSOR)
    return summary_pb2.Summary(value=[value])
