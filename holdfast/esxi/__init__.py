"""Sources and sinks: VMware disks, VM folders, raw images. Knows nothing of repositories."""
