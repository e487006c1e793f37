"""Stage 1 on Ray Tune: the space, the gate, the searcher, the scheduler, and what keeps a run from losing anything."""
