"""Detectors that can take part in an ensemble: ours, and those of others behind the same interface."""
