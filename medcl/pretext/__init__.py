"""Pretext tasks and their training loop."""
