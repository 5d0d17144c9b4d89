"""Reads a text as its reader would: what was encoded, spelled or hidden is decoded first."""
