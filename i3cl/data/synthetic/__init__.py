"""Generated scene text: simple shapes for the quickstart, street scenes for pre-training."""
