"""One file for each backend, loaded on use."""
