"""The protocols of the field, matching, recall, precision and F, and average precision."""
