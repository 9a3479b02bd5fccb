"""What a restore, a stream or a sync writes onto, and where that differs from what is wanted."""
