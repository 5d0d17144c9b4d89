"""Concepts from a few examples: a direction that reads and steers, and how well it does it."""
