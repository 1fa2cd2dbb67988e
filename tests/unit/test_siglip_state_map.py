"""SigLIP weights from published files into the tower and back: bit by bit, and refused where they don't fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from siglip_cases import TINY, WHOLE_MODEL, published, read_tower
from torch import Tensor

from megavlm.checkpoint.fresh import FreshWeights
from megavlm.checkpoint.hf_import import load_weights
from megavlm.errors import WeightsError
from megavlm.export.hf_export import folder_tensors
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.decoder.state_map import decoder_state_map
from megavlm.model.projector import projector_state_map
from megavlm.model.state_map import merged
from megavlm.model.towers.siglip import SiglipTower
from megavlm.model.towers.siglip_config import SIGLIP_SO400M, SiglipConfig
from megavlm.model.towers.siglip_state_map import find_siglip_prefix, is_unused, siglip_state_map

LLAVA = "model.vision_tower.vision_tower.vision_model."
KIND = TINY["an edge unseen"]


@pytest.fixture
def lone_group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def published_state(config: SiglipConfig, prefix: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The vision half of a published folder: one block more than is used, and the pooling head."""
    return {prefix + name: tensor.to(dtype) for name, tensor in published(config).state_dict().items()}


def write(state: dict[str, Tensor], file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    return file


def refusal(state: dict[str, Tensor], config: SiglipConfig, tmp_path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        read_tower(write(state, tmp_path / "siglip.safetensors"), config)
    return str(caught.value)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("prefix", [LLAVA, "vision_tower.vision_model.", "vision_model.", ""])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_goes_in_comes_out_bit_by_bit(
    kind: str, prefix: str, file: str, dtype: torch.dtype, tmp_path: Path, lone_group: dist.ProcessGroup
) -> None:
    config = TINY[kind]
    state = published_state(config, prefix, dtype)
    other = WHOLE_MODEL if prefix == "vision_model." else {}
    tower = read_tower(write(state | other, tmp_path / file), config)
    used = {name: tensor for name, tensor in state.items() if not is_unused(name, prefix, config.depth)}
    out = dict(folder_tensors([tower], siglip_state_map(config, prefix), lone_group))
    assert out.keys() == used.keys()
    assert all(torch.equal(out[name], tensor) and out[name].dtype == dtype for name, tensor in used.items())


def test_every_tensor_parallel_rank_gets_the_whole_tower(tmp_path: Path) -> None:
    file = write(published_state(KIND, LLAVA), tmp_path / "model.safetensors")
    alone, second_of_two = read_tower(file, KIND), read_tower(file, KIND, tensor_rank=1, tensor_size=2)
    for one, other in zip(alone.parameters(), second_of_two.parameters(), strict=True):
        assert torch.equal(one, other)


def test_fresh_weights_stand_under_our_prefix() -> None:
    model = torch.nn.ModuleDict({"tower": SiglipTower(KIND)})
    state_map = siglip_state_map(KIND, LLAVA, ours="tower.")
    load_weights([model], FreshWeights(state_map, seed=1, std=0.02), state_map, tensor_rank=0, tensor_size=1)
    state = model.state_dict()
    assert state["tower.blocks.1.mlp_norm.weight"].eq(1).all()
    assert state["tower.blocks.1.attention.qkv.bias"].eq(0).all()
    assert state["tower.patch_embedding.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert state["tower.position_embedding"].any()


def test_letters_agree_with_those_of_decoder_and_projector() -> None:
    decoder = DecoderConfig(
        family="qwen2",
        num_layers=1,
        hidden_size=1536,
        ffn_hidden_size=8960,
        num_attention_heads=12,
        num_query_groups=2,
        kv_channels=128,
        add_qkv_bias=True,
        vocab_size=151936,
    )
    parts = (
        decoder_state_map(decoder),
        projector_state_map(1152, 1536, ("model.mm_projector.0.", "model.mm_projector.2.")),
        siglip_state_map(SIGLIP_SO400M, LLAVA, ours="tower."),
    )
    shapes = merged(*parts).folder_shapes()
    for part in parts:
        assert shapes.items() >= part.folder_shapes().items()


def test_a_used_block_and_a_stranger_are_not_unused() -> None:
    names = {
        "vision_model.encoder.layers.2.layer_norm1.bias": False,
        "vision_model.encoder.layers.3.layer_norm1.bias": True,
        "vision_model.encoder.layers.10.layer_norm1.bias": True,
        "vision_model.encoder.layers.x.layer_norm1.bias": False,
        "vision_model.embeddings.class_embedding": False,
        "vision_model.head.probe": True,
        "text_model.encoder.layers.0.layer_norm1.bias": True,
        "logit_scale": True,
        "model.layers.30.input_layernorm.weight": False,
    }
    assert {name: is_unused(name, "vision_model.", depth=3) for name in names} == names


def test_a_tower_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    state = published_state(KIND, "vision_model.")
    del state["vision_model.encoder.layers.1.self_attn.k_proj.bias"]
    message = refusal(state, KIND, tmp_path)
    assert "'vision_model.encoder.layers.1.self_attn.k_proj.bias': 1 of" in message
    assert "take a complete folder" in message


def test_a_tower_with_a_class_token_is_refused(tmp_path: Path) -> None:
    state = published_state(KIND, "") | {"embeddings.class_embedding": torch.zeros(24)}
    assert "'embeddings.class_embedding': 1 tensors have no place" in refusal(state, KIND, tmp_path)


def test_positions_of_another_image_size_are_refused(tmp_path: Path) -> None:
    message = refusal(published_state(KIND, ""), KIND.replace(image_size=42), tmp_path)
    assert "embeddings.position_embedding.weight = (4, 24): the model needs the shape (9, 24); take" in message


def test_a_file_without_a_tower_is_refused(tmp_path: Path) -> None:
    message = refusal(WHOLE_MODEL, KIND, tmp_path)
    assert "siglip.safetensors = 'embeddings.patch_embedding.weight': is there nowhere; take a folder of" in message


def test_a_file_of_two_towers_is_refused() -> None:
    names = [prefix + "embeddings.patch_embedding.weight" for prefix in ("vision_tower.", "old.")]
    with pytest.raises(WeightsError, match=r"is there under the prefixes 'old\.', 'vision_tower\.'; take"):
        find_siglip_prefix(names, "model.safetensors")
