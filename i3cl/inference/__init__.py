"""From photographs to polygons: the one place that runs a checkpoint on images."""
