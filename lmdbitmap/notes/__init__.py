"""Small files in the store's folder: which checkpoints a repository, or a synced copy, counts from;
and what checkpoints of our making are called."""
