"""Backups in a repository: manifests, chains of images, digests, and the operations on them."""
