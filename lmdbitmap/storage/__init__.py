"""The store's inside: LMDB, the records in it, the files around it, and how it heals when it is opened."""
