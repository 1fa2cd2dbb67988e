"""InfiMM: an EVA tower, a perceiver resampler and gated cross-attention inside a LLaMA or Mistral decoder."""
