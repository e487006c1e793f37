"""How a command can end (docs/spec.md section 8)."""

from typing import Final

DONE: Final = 0  # of a search: at least one trial passed the gate, and Stage 2 is done
FAULT: Final = 1  # an internal fault, or Stage 2 without a single dataset that counts
BAD_INPUT: Final = 2
NO_SURVIVOR: Final = 3  # no trial passed the gate
NO_GO: Final = 4  # `nkat train --smoke`
UNHEALTHY: Final = 5  # `nkat doctor` found a fault
INTERRUPTED: Final = 130

RESUMABLE: Final = (None, FAULT, INTERRUPTED)  # of a run; None while it goes on, or when its driver was killed
