"""Small files in the store's folder that say which checkpoints a repository or a synced copy counts from.
Also the names of the checkpoints that backups and syncs make."""
