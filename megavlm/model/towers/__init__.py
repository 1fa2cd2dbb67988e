"""Vision towers: patch rows in, features of each image out. Plain torch, never tensor-parallel."""
