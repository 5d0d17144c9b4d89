"""Proof: entries, the Merkle log over them, signed checkpoints, verification."""
