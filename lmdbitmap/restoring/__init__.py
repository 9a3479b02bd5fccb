"""A backup put back, or served as it is."""
