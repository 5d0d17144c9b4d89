"""The HTTP edge: OpenAI wire format in, one readable path, OpenAI wire format out."""
