"""Runs the model: protocol, embedded worker process, client."""
