"""What Linux offers, and what it refuses: files that are durable, locks, and questions about both."""
