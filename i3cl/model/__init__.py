"""The I3CL network."""
