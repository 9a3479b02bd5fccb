"""Whether a store is sound, and what mends it."""
