"""Labels and predictions in the formats of other tools, and corrected labels back: one file a format."""
