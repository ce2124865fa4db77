"""Data sets in and out, images, training transforms and prediction tables."""
