"""Fort Point: serve open-weight models, watch them from inside, prove what happened."""

__version__ = "0.1.0"
