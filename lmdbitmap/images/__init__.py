"""Disk images: to open, to know again, to read and to write, wherever they are."""
