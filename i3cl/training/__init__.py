"""Training: the driver that starts a run on Ray Train, and the loop that every worker runs."""
