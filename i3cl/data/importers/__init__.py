"""Importers of the public data sets' own label formats; docs/datasets.md says where each set comes from and how it is laid out."""
