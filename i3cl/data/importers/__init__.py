"""Importers of the public data sets' own label formats; docs/datasets.md describes the sets."""
