"""Detections against truth: the field's protocols, formats and analysis of errors; docs/evaluation.md has a map."""
