"""Small files beside the store that say who counts from a disk's checkpoints."""
