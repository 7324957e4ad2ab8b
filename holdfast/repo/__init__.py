"""The repository engine. Knows nothing of hypervisors."""
