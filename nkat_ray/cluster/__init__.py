"""Ray: connections to a cluster, and the resources of its nodes: CPUs, GPUs, memory.

Importing this package sets the environment variables that Ray and PyTorch read when they are imported.
"""

import os

SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0: no output of Tune beside the run's own display
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run writes its own tables and event files
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the run handles signals itself (signals.py)
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # Tune's snapshots are not used: a run continues from its journal
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # else a trial whose time is up before its first epoch ends the run
    "TUNE_WARN_THRESHOLD_S": "30",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` makes every worker install a copy of the project
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a worker without a share of a GPU sees no GPU
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # workers of a local instance inherit it
}

for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)
