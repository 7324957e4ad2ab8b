"""One module per command, named like it; each holds its click command under the name `command`."""
