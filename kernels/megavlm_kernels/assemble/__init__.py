"""Token embeddings and image features to packed rows."""
