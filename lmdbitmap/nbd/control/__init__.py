"""The control socket of a process that serves disks: what it is told to do, and what it tells."""
