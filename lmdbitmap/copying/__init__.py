"""Copies data from disk to disk: several threads read, hash and write it."""
