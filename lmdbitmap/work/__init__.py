"""Threads, pace and memory for a job, and the handling of a part that fails."""
