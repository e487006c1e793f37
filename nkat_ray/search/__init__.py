"""Stage 1 on Ray Tune: the gate, the searcher, the scheduler, and the trial that runs on a worker."""

import nkat_ray.cluster  # noqa: F401  what Ray reads from the environment, before Ray is imported
