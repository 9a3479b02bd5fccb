"""The guest's door: serves disks over NBD."""
