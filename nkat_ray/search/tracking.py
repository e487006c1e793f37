"""Log every trial to an experiment tracker, MLflow or Weights & Biases, with Ray's callbacks (`--log_to`)."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nkat_ray.config import RunConfig
from nkat_ray.errors import UserError

if TYPE_CHECKING:
    from ray.tune import Callback

PROJECT: Final = "nkat-ray"  # project in Weights & Biases, unless $WANDB_PROJECT is set
UPLOAD_S: Final = 60  # longest wait for uploads to Weights & Biases at the end of Stage 1; Ray's default is 1,800
MLFLOW_FOLDER: Final = "mlflow"
MLFLOW_FILES: Final = "MLFLOW_ALLOW_FILE_STORE"  # MLflow 3 refuses a folder without it; a database needs more packages


def refuse_absent(run: RunConfig) -> None:
    """Refuse (UserError) a tracker whose package is not installed, or Weights & Biases without an API key."""
    if run.log_to == "off":
        return
    if importlib.util.find_spec(run.log_to) is None:
        raise UserError(
            f"log_to is {run.log_to!r}; that package is not installed; "
            f"`uv sync --extra {run.log_to}` adds it, --log_to off does without"
        )
    if run.log_to == "wandb":
        for callback in trackers_of(run, Path()):
            try:
                callback.setup()  # looks for a key
            except ValueError as error:
                advice = "set WANDB_API_KEY, type `wandb login`, or set WANDB_MODE=offline"
                raise UserError(f"log_to is {run.log_to!r}; it has no API key; {advice}") from error


def trackers_of(run: RunConfig, folder: Path) -> "list[Callback]":
    """Return Tune's callbacks that log to the run's tracker; an empty list if it has none.

    Args:
        run: configuration; the run's name becomes the experiment in MLflow or the group in Weights & Biases.
    """
    if run.log_to == "mlflow":
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault(MLFLOW_FILES, "true")
            uri = (folder / MLFLOW_FOLDER).absolute().as_uri()
        return [MLflowLoggerCallback(tracking_uri=uri, experiment_name=run.name)]
    return [_wandb_callback(run)] if run.log_to == "wandb" else []


def _wandb_callback(run: RunConfig) -> "Callback":
    from ray.air.integrations.wandb import WandbLoggerCallback

    class WandbLogger(WandbLoggerCallback):
        """Ray's callback, except that it also ends the logging processes of interrupted trials.

        Ray waits for the logging processes of all trials, but does not stop those of interrupted ones.
        """

        def on_experiment_end(self, trials: Any, **info: Any) -> None:
            """Ask the remaining processes to finish, then wait for them."""
            for trial in list(self._trial_logging_actors):
                self._signal_logging_actor_stop(trial)
            super().on_experiment_end(trials, **info)

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return WandbLogger(project=project, group=run.name, excludes=["resume_from"], upload_timeout=UPLOAD_S)
