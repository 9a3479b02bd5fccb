"""Keeps a second copy of a disk up to date in place."""
