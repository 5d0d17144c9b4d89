"""Training dictionaries of features: batches, the trainer, its measurements and report."""
