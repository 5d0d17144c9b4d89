"""Scripts that make the artefacts the package ships. Not part of the package itself."""
