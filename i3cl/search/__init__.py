"""Ray Tune over any settings: thresholds from stored predictions, or short trainings of students."""
