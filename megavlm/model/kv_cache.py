"""A decoder that reads a text piece by piece and keeps the keys and values of what it has read."""

from __future__ import annotations

from typing import Any

from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megavlm.model.decoder.model import Decoder


class CachedDecoder:
    """A whole decoder (no pipeline stages, no sequence parallelism) in evaluation mode, and its cache."""

    def __init__(self, decoder: Decoder, rows: int, length: int) -> None:
        """The cache has room for `rows` texts of `length` tokens, of this rank's key-value heads."""
        assert decoder.pre_process and decoder.post_process, "the cache serves a decoder in one piece"
        assert not decoder.training and not decoder.config.sequence_parallel
        self.decoder = decoder
        self.cache = StaticInferenceContext(rows, length)

    def read(self, tokens: Tensor, **arguments: Any) -> Tensor:
        """tokens [b, s], the next ones of every row -> logits [b, padded vocabulary] behind the last, on every rank.

        `arguments` go to the decoder's forward. Only the first piece may be longer than one token: behind it,
        megatron-core masks nothing, which is right for a single query alone.
        """
        if self.cache.sequence_len_offset > 0:
            assert tokens.size(1) == 1, "behind the first piece one token is read at a time"
            self.cache.enable_decode_mode()
        logits: Tensor = self.decoder(
            input_ids=tokens,
            position_ids=None,
            attention_mask=None,
            inference_context=self.cache,
            runtime_gather_output=True,
            **arguments,
        )
        self.cache.increment_sequence_len_offset(tokens.size(1))
        return logits[:, -1]
