"""A backup from its plan to its result, and who counts from which checkpoint."""
