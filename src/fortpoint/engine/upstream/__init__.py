"""The engine that has OpenAI-compatible servers answer, inside the gateway's process."""
