"""Synthetic scene text for pre-training: typefaces, words, backgrounds, scenes, and sets of them on disk."""
