"""Detection against truth: the text-detection IoU protocol and COCO average precision."""
