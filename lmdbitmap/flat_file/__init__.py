"""The canonical bitmap file around its bytes, which are those of format.py beside this folder."""
