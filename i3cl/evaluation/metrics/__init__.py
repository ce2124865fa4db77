"""The protocols of the field, matching and average precision."""
