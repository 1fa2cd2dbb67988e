"""A model's answers: logits and text."""
