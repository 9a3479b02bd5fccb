"""Data on its way from disk to disk: read, hashed and written by several threads."""
