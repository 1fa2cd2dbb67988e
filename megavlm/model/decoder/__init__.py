"""The text decoder: LLaMA-2 and Vicuna, Mistral and Zephyr, Qwen2.5, from one builder."""
