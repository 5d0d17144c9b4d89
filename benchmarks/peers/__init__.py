"""The engine beside its peers: environments, runners, prompts, and what the runs need."""
