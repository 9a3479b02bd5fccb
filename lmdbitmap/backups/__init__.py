"""A backup from its plan to its result, and what becomes of checkpoints that no backup needs any more."""
