"""Gives a job access to disks that are at rest, attached in this process, or served by another process."""
