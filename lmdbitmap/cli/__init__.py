"""The command line: the only place that prints, exits and reads the environment. It begins in `main.py`."""
