"""Pictures, curves and the HTML report of a run."""
