"""A process that serves disks is told what to do, and tells how it is: the owner's end of its control socket."""
