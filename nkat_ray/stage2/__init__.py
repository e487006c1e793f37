"""Stage 2: transfer the trials that passed the gate to every dataset, rank them by validation, test them once."""

import nkat_ray.cluster  # noqa: F401  what Ray reads from the environment, before Ray is imported
