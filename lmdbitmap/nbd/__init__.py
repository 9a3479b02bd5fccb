"""NBD: what both ends of a connection know of it, and how a process that serves disks is told things."""
