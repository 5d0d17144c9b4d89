"""May it pass: detectors over text and over the residual stream, and the policy."""
