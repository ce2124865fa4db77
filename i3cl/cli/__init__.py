"""The command line: one file for each command of `i3cl` and for what they share."""
