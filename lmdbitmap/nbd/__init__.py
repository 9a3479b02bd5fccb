"""What both ends of a connection know: of NBD, and of the lines in which a process that serves disks is spoken to."""
