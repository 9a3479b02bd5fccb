"""The targets that a restore, a stream or a sync writes to, and where they differ from what is wanted."""
