"""The owner's end of the control socket: commands to a process that serves disks, and its status."""
