"""The command line: the only place that prints, exits and looks at the environment. It begins in `main.py`."""
