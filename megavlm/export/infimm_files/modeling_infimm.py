"""InfiMM for transformers: text generation from interleaved images and text.

The language model is transformers' own Mistral or Llama. Before every n-th of its layers stands a gated block of
cross-attention, by which each token sees one image: the last `<image>` before it in its own sample. Modules are named
as in the released weights. Letters of shapes: B samples, T tokens, N images of a sample, l latents of an image,
D the tower's width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaForCausalLM, MistralForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_infimm import InfiMMConfig, InfiMMLlamaConfig, InfiMMVicunaConfig, InfiMMZephyrConfig
from .vision_infimm import (
    EvaAttention,
    EvaTower,
    PerceiverResampler,
    feed_forward,
    split_heads,
)

_LANGUAGE_MODELS = {"mistral": MistralForCausalLM, "llama": LlamaForCausalLM}
_PROMPT_INPUTS = ("images", "pixel_values", "media_latents", "images_per_sample")
"""Arguments of `forward` that belong to the prompt: once it is in the cache they are not looked at again."""


@dataclass
class Media:
    """The images of a batch. Made once for a prompt; beside the key-value cache it serves all later steps."""

    latents: Tensor
    """[B, N, l, D]"""
    counts: Tensor
    """[B]: how many images each sample has; the rest of the N are padding."""
    keys_values: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Decoder layer -> the latents' keys and values in its gated block, each [B, heads, N * l, d]."""


class MediaView(NamedTuple):
    """What the tokens of one forward pass see of the images."""

    media: Media
    mask: Tensor
    """[B, 1, T, N * l]: True where a token may look. All True for a token before the first image, so that its softmax
    is defined: `sees_image` drops what comes out."""
    sees_image: Tensor
    """[B, T, 1]: 1 behind the first image of the sample, 0 before it."""
    has_image: Tensor
    """[B, 1, 1]: 1 if the sample has an image; 0 turns the feed-forward of its gated blocks off as well."""


class MaskedCrossAttention(nn.Module):
    """Attention from text to latents."""

    def __init__(self, width: int, media_width: int, layer: int, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.heads = sizes["heads"]
        inner = self.heads * sizes["head_width"]
        self.layer = layer
        self.norm = nn.LayerNorm(width, sizes["norm_epsilon"])
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(media_width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, view: MediaView) -> Tensor:
        k, v = self._keys_values(view.media, x.device)
        q = split_heads(self.to_q(self.norm(x)), self.heads)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=view.mask)
        return self.to_out(out.transpose(1, 2).flatten(2) * view.sees_image)

    def _keys_values(self, media: Media, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.layer not in media.keys_values:
            # With a device map the layers lie on several devices, and the latents on the first.
            k, v = self.to_kv(media.latents.flatten(1, 2).to(device)).chunk(2, dim=-1)
            media.keys_values[self.layer] = split_heads(k, self.heads), split_heads(v, self.heads)
        return media.keys_values[self.layer]


class GatedCrossAttentionBlock(nn.Module):
    """Cross-attention and a feed-forward, each through a gate that training starts at zero."""

    def __init__(self, width: int, media_width: int, layer: int, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.attn = MaskedCrossAttention(width, media_width, layer, sizes)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(width, sizes["ff_multiple"], sizes["norm_epsilon"])
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, view: MediaView) -> Tensor:
        x = x + self.attn(x, view) * self.attn_gate.tanh()
        return x + view.has_image * self.ff(x) * self.ff_gate.tanh()


class FlamingoLayer(nn.Module):
    """A layer of the language model, with or without a gated block before it."""

    def __init__(self, decoder_layer: nn.Module, gated_cross_attn_layer: GatedCrossAttentionBlock | None) -> None:
        super().__init__()
        self.gated_cross_attn_layer = gated_cross_attn_layer
        self.decoder_layer = decoder_layer

    def forward(self, hidden_states: Tensor, *args: Any, media_view: MediaView | None = None, **kwargs: Any) -> Any:
        if self.gated_cross_attn_layer is not None and media_view is not None:
            hidden_states = self.gated_cross_attn_layer(hidden_states, media_view)
        return self.decoder_layer(hidden_states, *args, **kwargs)


class Flamingo(nn.Module):
    """Tower, resampler and language model under the names of the released weights."""

    def __init__(self, config: InfiMMConfig) -> None:
        super().__init__()
        language, media_width = config.language, config.visual["width"]
        self.vision_encoder = EvaTower(config.visual)
        self.perceiver = PerceiverResampler(media_width, config.resampler)
        self.lang_encoder = _LANGUAGE_MODELS[language.model_type](language)
        decoder = self.lang_encoder.model
        decoder.layers = nn.ModuleList(
            FlamingoLayer(
                layer,
                GatedCrossAttentionBlock(language.hidden_size, media_width, i, config.cross_attention)
                if (i + 1) % config.cross_attn_every_n_layers == 0
                else None,
            )
            for i, layer in enumerate(decoder.layers)
        )


class InfiMMModel(PreTrainedModel, GenerationMixin):
    """What the three models share. The vision tower is frozen; to train it, set its parameters' `requires_grad`."""

    config_class: type[InfiMMConfig] = InfiMMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FlamingoLayer", "EvaBlock", "PerceiverResampler"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    # Tables that released files hold and that are computed here.
    _keys_to_ignore_on_load_unexpected = [r"rope\.freqs_(cos|sin)$"]  # noqa: RUF012

    def __init__(self, config: InfiMMConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # the library guesses it from class names that end so
        self.model = Flamingo(config)
        self.model.vision_encoder.requires_grad_(False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in transformers; the tower comes back frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Loading makes new parameters, and they want gradients.
        model.model.vision_encoder.requires_grad_(False)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EvaTower):
            nn.init.normal_(module.cls_token, std=0.02)
            nn.init.normal_(module.pos_embed, std=0.02)
        elif isinstance(module, EvaAttention):
            nn.init.zeros_(module.q_bias)
            nn.init.zeros_(module.v_bias)
        elif isinstance(module, PerceiverResampler):
            nn.init.normal_(module.latents)
        elif isinstance(module, GatedCrossAttentionBlock):
            nn.init.zeros_(module.attn_gate)
            nn.init.zeros_(module.ff_gate)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.lang_encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.lang_encoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lang_encoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.lang_encoder.set_output_embeddings(new_embeddings)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        images: Tensor | None = None,
        pixel_values: Tensor | None = None,
        media_latents: Tensor | None = None,
        images_per_sample: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of input_ids [B, T], and the loss if there are labels [B, T] (-100 is ignored).

        images or pixel_values, the same thing: [B, N, 3, size, size] or [B, N, 1, 3, size, size], the images of each
        sample in the order of its `<image>` tokens; samples with fewer have anything, say zeros, behind them. None
        for text alone. media_latents: what `encode_images` made of them, instead of them.
        images_per_sample [B]: how many `<image>` tokens show an image, the first ones; by default all.

        A step behind a filled cache sees the images of the cached prompt; its tokens see the last one.
        """
        is_step = _length(past_key_values) > 0
        if is_step:
            media = getattr(past_key_values, "infimm_media", None)
        else:
            pixels = self._image_batch(images, pixel_values, len(input_ids))
            media = self._media(input_ids, pixels, media_latents, images_per_sample)
        view = None if media is None else self._view(media, input_ids, is_step)
        outputs = self.model.lang_encoder.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            media_view=view,
            **kwargs,
        )
        if outputs.past_key_values is not None:
            outputs.past_key_values.infimm_media = media
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.lang_encoder.lm_head(outputs.last_hidden_state[:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=logits.size(-1), **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def encode_images(self, pixel_values: Tensor, images_per_sample: Tensor) -> Tensor:
        """[B, N, 3, size, size] -> [B, N, l, D], zeros for the images behind a sample's own."""
        tower = self.model.vision_encoder
        slots = torch.arange(pixel_values.size(1), device=pixel_values.device)
        real = slots < images_per_sample.to(pixel_values.device)[:, None]
        is_trained = any(parameter.requires_grad for parameter in tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
            features = tower(pixel_values[real])
        latents = self.model.perceiver(features)
        everywhere = latents.new_zeros(*real.shape, *latents.shape[1:])
        everywhere[real] = latents
        return everywhere

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        images: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As everywhere in transformers. The images are encoded once, whatever the number of beams or samples drawn.

        Images belong to the `<image>` tokens of the prompt: one that the model writes itself shows nothing new.
        """
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        if prompt is not None and not _length(kwargs.get("past_key_values")):
            pixels = self._image_batch(images, pixel_values, len(prompt))
            media = self._media(prompt, pixels, None, None)
            counts = prompt.new_zeros(len(prompt)) if media is None else media.counts
            kwargs |= {"media_latents": None if media is None else media.latents, "images_per_sample": counts}
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        """Drop what the cache already knows."""
        model_inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        if _length(past_key_values):
            for name in _PROMPT_INPUTS:
                model_inputs.pop(name, None)
        return model_inputs

    def _image_batch(self, images: Tensor | None, pixel_values: Tensor | None, batch: int) -> Tensor | None:
        """[B, N, 3, size, size] out of the spellings that callers may use."""
        if images is not None and pixel_values is not None:
            raise ValueError("images and pixel_values are two names of one argument: pass one of them")
        pixels = pixel_values if images is None else images
        if pixels is None:
            return None
        if pixels.dim() == 6 and pixels.size(2) == 1:
            pixels = pixels.squeeze(2)
        size = self.config.visual["image_size"]
        if pixels.dim() != 5 or pixels.shape[2:] != (3, size, size) or len(pixels) != batch:
            raise ValueError(
                f"images of shape {list(pixels.shape)}: must be [{batch} samples, images, 3, {size}, {size}]; "
                "the processor of this folder makes them"
            )
        return pixels

    def _media(
        self, input_ids: Tensor, pixels: Tensor | None, latents: Tensor | None, counts: Tensor | None
    ) -> Media | None:
        """The prompt's images; None if no sample has one."""
        given = pixels if latents is None else latents
        supplied = 0 if given is None else given.size(1)
        if counts is None:
            counts = (input_ids == self.config.image_token_id).sum(dim=1)
        most = int(counts.max())
        if most > supplied:
            raise ValueError(
                f"sample {int(counts.argmax())} has {most} <image> tokens and {supplied} images: "
                "pass one image for each of its <image> tokens"
            )
        if most == 0 or given is None:
            return None
        return Media(self.encode_images(given, counts) if latents is None else given, counts)

    def _view(self, media: Media, input_ids: Tensor, is_step: bool) -> MediaView:
        """What the tokens see; behind a cached prompt all see its last image."""
        counts, images = media.counts[:, None], media.latents.size(1)
        if is_step:
            text_time = counts.expand(input_ids.shape)
        else:
            text_time = torch.minimum((input_ids == self.config.image_token_id).cumsum(dim=1), counts)
        image_of_latent = torch.arange(1, images + 1, device=text_time.device).repeat_interleave(media.latents.size(2))
        text_time = text_time.unsqueeze(-1)
        mask = (text_time == image_of_latent) | (text_time == 0)
        as_factor = media.latents.dtype
        return MediaView(
            media, mask.unsqueeze(1), (text_time > 0).to(as_factor), (counts > 0).unsqueeze(-1).to(as_factor)
        )


class InfiMMZephyrModel(InfiMMModel):
    """InfiMM-Zephyr-7B."""

    config_class = InfiMMZephyrConfig


class InfiMMVicunaModel(InfiMMModel):
    """InfiMM-Vicuna-13B."""

    config_class = InfiMMVicunaConfig


class InfiMMLlamaModel(InfiMMModel):
    """InfiMM-Llama2-13B."""

    config_class = InfiMMLlamaConfig


def _length(cache: Any) -> int:
    """Tokens in a key-value cache."""
    return 0 if cache is None else cache.get_seq_length()
