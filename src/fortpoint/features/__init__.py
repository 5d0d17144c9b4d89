"""Reads and steers: dictionaries of features, named directions, and where they live."""
