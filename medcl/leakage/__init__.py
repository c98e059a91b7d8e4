"""What weights have seen, and whether they are tested on it."""
