"""Our weights into Hugging Face folders."""
