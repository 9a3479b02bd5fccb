"""Disk images, local or behind an NBD server: opening, identifying, reading and writing them."""
