"""Data files: the code that an exported InfiMM folder carries, to be run by transformers and imported by nobody here."""
