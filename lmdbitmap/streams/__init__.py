"""Diff streams: a backup without a repository, out and in."""
