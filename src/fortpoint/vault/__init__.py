"""Weights at rest: where they come from, their digest, their conversion."""
