"""Attention and packing kernels of megavlm: each op is a folder with its plain truth beside the Triton kernel."""
