"""Perceiver resampling: latents attend to their image's tokens and to the latents themselves."""
