"""How work is done: threads, pace and memory for it, and what one part that fails means for the others."""
