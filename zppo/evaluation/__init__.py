"""Held-out accuracy of a model folder or a run: what to ask, and what came of it."""
