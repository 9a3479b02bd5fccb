"""A disk behind another NBD server, as a device."""
