"""Label efficiency: several arms at several numbers of labels."""
