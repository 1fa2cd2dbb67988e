"""Layers, towers and decoders: what is computed, with no rank and no process group getter in it."""
