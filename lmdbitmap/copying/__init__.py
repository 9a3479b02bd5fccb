"""Data on its way from a disk into an image: read, proven, hashed and written by several threads."""
