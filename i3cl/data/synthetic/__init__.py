"""Generated scene text: plain pictures for the quickstart (plain.py), street scenes for pre-training (street.py)."""
