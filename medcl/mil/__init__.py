"""Multiple-instance learning: bags of slides, images or volumes to classes."""
