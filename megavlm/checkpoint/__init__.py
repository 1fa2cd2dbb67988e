"""Weights and state on disk: Hugging Face folders in, sharded checkpoints in and out."""
