"""What a decoder layer is made of, and the decoder's part of megatron-core's TransformerConfig."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megavlm.model.decoder.config import DecoderConfig

# Transformer Engine holds a norm's weight inside the linear layer behind it; checkpoints use one name for both.
FUSED_NORM_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def decoder_layer(provider: BackendSpecProvider) -> ModuleSpec:
    """One pre-norm layer: self-attention, then a gated MLP."""
    fused = provider.fuse_layernorm_and_linear()
    norm = IdentityOp if fused else provider.layer_norm(rms_norm=True)
    into_columns = provider.column_parallel_layer_norm_linear() if fused else provider.column_parallel_linear()
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=into_columns,
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=into_columns, linear_fc2=provider.row_parallel_linear()),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=FUSED_NORM_NAMES,
        ),
    )


def decoder_block(provider: BackendSpecProvider, num_layers: int) -> TransformerBlockSubmodules:
    """The `num_layers` layers of one pipeline chunk, and the norm behind the last layer of all."""
    return TransformerBlockSubmodules(
        layer_specs=[decoder_layer(provider)] * num_layers, layer_norm=provider.layer_norm(rms_norm=True)
    )


def architecture_fields(config: DecoderConfig) -> dict[str, Any]:
    """The fields of TransformerConfig that the architecture decides; layout and precision add theirs."""
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": config.add_qkv_bias,
        "hidden_dropout": config.hidden_dropout,
        "attention_dropout": config.attention_dropout,
        "init_method_std": config.init_method_std,
        # Weights come from a folder or from a seeded generator by name, never from the layers' own initialisation:
        # that one depends on the layout.
        "perform_initialization": False,
    }
