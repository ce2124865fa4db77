"""Truth and results in the formats of the field."""
