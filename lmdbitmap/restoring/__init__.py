"""Restores a backup, or serves it read-only."""
