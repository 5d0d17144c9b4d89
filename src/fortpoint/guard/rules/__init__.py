"""Rules that look at the characters of a text: secrets, hidden text, encodings, planted strings."""
