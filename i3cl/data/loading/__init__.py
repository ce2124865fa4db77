"""From a data set on disk to the batches that training sees: decoding, augmentation, Ray Data."""
