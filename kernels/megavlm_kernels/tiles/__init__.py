"""Decoded images to normalised patch rows, in one pass."""
