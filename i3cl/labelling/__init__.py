"""Unlabelled photographs to pseudo labels: ensemble prediction, fusion, selection."""
