"""What a dictionary's features mean: where each is active, what it writes, its name and kin."""
