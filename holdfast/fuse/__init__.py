"""Restore points as a file system."""
