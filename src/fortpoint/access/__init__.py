"""Who may ask: principals and keys."""
