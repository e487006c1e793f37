"""Experiment trackers that see every trial too: MLflow and Weights & Biases, through Ray's own callbacks (--log_to)."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nkat_ray.config import RunConfig

if TYPE_CHECKING:
    from ray.tune import Callback

PROJECT = "nkat-ray"  # in Weights & Biases, unless $WANDB_PROJECT names another
MLFLOW_FOLDER = "mlflow"
MLFLOW_FILES = "MLFLOW_ALLOW_FILE_STORE"  # MLflow 3 refuses a folder without it, and a database needs the whole package


def refuse_absent(run: RunConfig) -> None:
    """Refuse, before any work, a tracker that could not be told anything.

    Raises:
        ValueError: its package is not installed, or Weights & Biases has no key.
    """
    if run.log_to == "off":
        return
    if importlib.util.find_spec(run.log_to) is None:
        raise ValueError(
            f"log_to is {run.log_to!r}; that package is not installed; "
            f"`uv sync --extra {run.log_to}` adds it, --log_to off does without"
        )
    if run.log_to == "wandb":
        for callback in trackers_of(run, Path()):
            callback.setup()  # a missing key is found here


def trackers_of(run: RunConfig, folder: Path) -> "list[Callback]":
    """Tune's callbacks that tell the tracker; none without one.

    Args:
        run: the run; its name becomes MLflow's experiment, or the group in Weights & Biases.
        folder: the run's local folder.
    """
    if run.log_to == "mlflow":
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault(MLFLOW_FILES, "true")
            uri = (folder / MLFLOW_FOLDER).absolute().as_uri()
        return [MLflowLoggerCallback(tracking_uri=uri, experiment_name=run.name)]
    if run.log_to == "wandb":
        from ray.air.integrations.wandb import WandbLoggerCallback

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return [WandbLoggerCallback(project=project, group=run.name, excludes=["resume_from"])]
    return []
