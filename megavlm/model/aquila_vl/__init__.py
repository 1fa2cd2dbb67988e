"""Aquila-VL: a decoder that reads the tokens of SigLIP tiles in its text, as LLaVA-OneVision does."""
