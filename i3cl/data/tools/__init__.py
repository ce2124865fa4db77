"""Splits, near-duplicates and degraded copies of data sets."""
