"""The command line: the only place that prints, exits and reads the environment.

It begins in `__main__.py`, beside this folder, which calls `main.py`.
"""
