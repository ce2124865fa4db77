"""Data sets and predictions as they lie on disk, and the records that the rest of the code works with."""
