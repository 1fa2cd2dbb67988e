"""Flamingo cross-attention: each text token attends to the latents of its own image."""
