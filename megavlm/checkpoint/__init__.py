"""Saving and loading: sharded checkpoints, and weight folders of other programs."""
