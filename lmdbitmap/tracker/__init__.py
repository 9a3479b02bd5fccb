"""A disk while it is written: its periods, checkpoints and snapshots, and whether their word is good."""
