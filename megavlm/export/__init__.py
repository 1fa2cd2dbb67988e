"""Our state as Hugging Face folders."""
