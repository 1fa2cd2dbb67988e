"""The gated residual of Flamingo blocks, fused."""
