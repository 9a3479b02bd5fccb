"""Diff streams: backups without a repository, written to a stream and applied from one."""
