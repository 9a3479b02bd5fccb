"""Flat bitmap files on disk. Their bytes are encoded and decoded by format.py beside this folder."""
