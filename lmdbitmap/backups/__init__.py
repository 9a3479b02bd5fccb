"""Makes a backup from its plan to its result, and forgets the checkpoints that no backup needs any more."""
