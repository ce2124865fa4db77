"""From a checkpoint and photographs of any size to polygons in the photographs' own pixels."""
