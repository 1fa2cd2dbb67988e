"""Samples: what they are, in which order they come, how they are read."""
