"""Backups where they lie: manifests, chains of images, their digests, and what is done with them."""
