"""Training dictionaries beside the peers: activations, turns, runners in their environments."""
