"""Teaches the guard's detectors: from labelled texts to tables, probes, thresholds and a card.

Nothing here touches a model: what the residual stream holds comes in as ``Activations``.
"""
