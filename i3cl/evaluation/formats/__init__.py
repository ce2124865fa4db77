"""Truths and results as the outside world writes them: one file per family of formats, `read.py` tells them apart."""
