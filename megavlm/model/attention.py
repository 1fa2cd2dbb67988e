"""Core attention over torch's `scaled_dot_product_attention`, for machines without Transformer Engine.

megatron-core's own local attention materialises scores and masks and knows no packed rows. This one hands the work
to torch's fused kernels: grouped queries, causal or bidirectional, and packed rows document by document, so that no
mask over the whole row is ever built. The heads it sees are the ones of its tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@dataclass
class PackedRows(PackedSeqParams):
    """Documents of a row as megatron-core takes them, and as the host knows them without waiting for a device."""

    lengths: tuple[int, ...] = ()


class SDPACoreAttention(MegatronModule):
    """Softmax attention between already projected queries, keys and values."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "context parallelism needs Transformer Engine's attention"
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend; `attention_mask`, where given, is True where a query must not look (megatron-core's convention).

        Unpacked: query [s, b, heads, d], key and value [t, b, groups, d] -> [s, b, heads * d].
        Packed:   query [tokens, heads, d], key and value [tokens, groups, d] -> [tokens, heads * d].
        """
        assert attention_bias is None, "an attention bias has no place in these models"
        causal = attn_mask_type == AttnMaskType.causal
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params, causal)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask = None if causal or attention_mask is None else attention_mask.logical_not()
        out = self._attend(q, k, v, causal, mask)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, rows: PackedSeqParams, causal: bool) -> Tensor:
        assert isinstance(rows, PackedRows)
        # Each document costs two operations more, not a dozen: all else is done to the row as a whole.
        heads_first = (x.transpose(0, 1).unsqueeze(0).split(rows.lengths, dim=2) for x in (query, key, value))
        documents = zip(*heads_first, strict=True)
        outputs = [self._attend(q, k, v, causal, None).transpose(1, 2) for q, k, v in documents]
        return torch.cat(outputs, dim=1).flatten(2).squeeze(0)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
        """[b, heads, s, d] by [b, groups, t, d]: torch repeats the groups itself."""
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=q.size(1) != k.size(1),
        )
