"""Other tools' files: SAELens dictionaries, Neuronpedia's JSONL, GGUF control vectors."""
