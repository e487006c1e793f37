"""Stage 1 on Ray Tune: the space, the gate, the searcher, the scheduler, and what keeps a run from losing anything.

Importing this package sets what Ray reads from the environment when *it* is imported: later would be too late.
"""

import os

SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with verbose=0 this leaves the terminal to the run's own display
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run writes its own tables and event files
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is a KeyboardInterrupt in the driver: run.py ends it in order
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # nobody reads Tune's snapshots: the journal is what a run continues from
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # else a trial whose time is up before its first epoch ends the run
    "TUNE_WARN_THRESHOLD_S": "30",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` makes every worker install a copy of the project
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a worker without a GPU share sees no GPU
}

for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)
