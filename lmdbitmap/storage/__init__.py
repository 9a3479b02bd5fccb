"""The inside of the store: LMDB, its records, the files around it, and how opening a damaged store heals it."""
