"""What lies behind a score: kinds of errors, likely causes, confidence intervals."""
