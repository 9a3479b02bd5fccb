"""What `check` looks at when a person asks whether a store is sound."""
