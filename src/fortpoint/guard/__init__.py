"""May it pass: detectors that read text and the model's residual stream, and the decision."""
