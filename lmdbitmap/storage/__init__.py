"""The store's inside: LMDB, the records in it, the files beside it, and what heals them."""
