"""A backup put back: onto a file, a device or a far disk, or served as it is."""
