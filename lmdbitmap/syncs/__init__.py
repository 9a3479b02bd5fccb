"""A second copy of a disk, brought up to date in place."""
