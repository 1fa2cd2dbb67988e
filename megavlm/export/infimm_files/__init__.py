"""Data files: code that an exported InfiMM folder carries, run by transformers and imported by nobody here."""
