"""The canonical bitmap file (format.py), and what is done with one."""
