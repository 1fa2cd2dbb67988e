"""EVA weights from released files into the tower and back: bit by bit, and refused where they don't fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from eva_cases import TINY, released_state
from safetensors.torch import save_file
from torch import Tensor

from megavlm.checkpoint.fresh import FreshWeights
from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.checkpoint.hf_import import check_folder, load_weights
from megavlm.errors import WeightsError
from megavlm.export.hf_export import folder_tensors
from megavlm.model.towers.eva import EvaTower
from megavlm.model.towers.eva_config import EvaConfig
from megavlm.model.towers.eva_state_map import INFIMM_PREFIX, eva_state_map, find_eva_prefix

TEXT_TOWER = {"text.token_embedding.weight": torch.ones(5, 4), "logit_scale": torch.tensor(4.6)}


@pytest.fixture
def lone_group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def write(state: dict[str, Tensor], file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    return file


def read_tower(file: Path, config: EvaConfig, tensor_rank: int = 0, tensor_size: int = 1) -> EvaTower:
    with HFFolder.open_file(file) as source:
        prefix = find_eva_prefix(source.names(), file.name)
        state_map = eva_state_map(config, prefix)
        check_folder(source, state_map, file.name, prefix)
        dtype = source.dtype(prefix + "cls_token")
        tower = EvaTower(config).to(dtype)
        load_weights([tower], source, state_map, tensor_rank, tensor_size)
    return tower


def refusal(state: dict[str, Tensor], config: EvaConfig, tmp_path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        read_tower(write(state, tmp_path / "clip.pt"), config)
    return str(caught.value)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("prefix", [INFIMM_PREFIX, "visual.", ""])
@pytest.mark.parametrize("file", ["clip.pt", "model.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_goes_in_comes_out_bit_by_bit(
    kind: str, prefix: str, file: str, dtype: torch.dtype, tmp_path: Path, lone_group: dist.ProcessGroup
) -> None:
    config = TINY[kind]
    state = {name: tensor.to(dtype) for name, tensor in released_state(config, prefix).items()}
    other = TEXT_TOWER if prefix == "visual." else {}
    tower = read_tower(write(state | other, tmp_path / file), config)
    state_map = eva_state_map(config, prefix)
    out = dict(folder_tensors([tower], state_map, lone_group))
    out |= {name: table.to(dtype) for name, table in state_map.constants.items()}
    assert out.keys() == state.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in state.items())


def test_rotary_tables_may_be_missing(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in released_state(TINY["L"]).items() if "rope" not in name}
    assert len(state) < len(released_state(TINY["L"]))
    read_tower(write(state, tmp_path / "clip.pt"), TINY["L"])


def test_every_tensor_parallel_rank_gets_the_whole_tower(tmp_path: Path) -> None:
    file = write(released_state(TINY["L"]), tmp_path / "clip.pt")
    alone, second_of_two = read_tower(file, TINY["L"]), read_tower(file, TINY["L"], tensor_rank=1, tensor_size=2)
    for one, other in zip(alone.parameters(), second_of_two.parameters(), strict=True):
        assert torch.equal(one, other)


def test_our_names_can_stand_under_a_prefix(tmp_path: Path) -> None:
    config = TINY["E"]
    model = torch.nn.ModuleDict({"tower": EvaTower(config)})
    state_map = eva_state_map(config, "visual.", ours="tower.")
    load_weights([model], FreshWeights(state_map, seed=1, std=0.02), state_map, tensor_rank=0, tensor_size=1)
    state = model.state_dict()
    assert state["tower.blocks.1.mlp_norm.weight"].eq(1).all()
    assert state["tower.blocks.1.attention.q_bias"].eq(0).all()
    assert state["tower.patch_embedding.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def test_a_tower_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    state = released_state(TINY["g"], "visual.")
    del state["visual.blocks.1.mlp.fc2.bias"]
    message = refusal(state, TINY["g"], tmp_path)
    assert "clip.pt = 'visual.blocks.1.mlp.fc2.bias': 1 of" in message and "take a complete folder" in message


def test_a_tower_of_another_kind_is_refused(tmp_path: Path) -> None:
    message = refusal(released_state(TINY["L"]), TINY["g"], tmp_path)
    assert "tensors are missing" in message and "attn.qkv.weight" in message


def test_patches_of_another_size_are_refused(tmp_path: Path) -> None:
    state = released_state(TINY["g"])
    state[INFIMM_PREFIX + "patch_embed.proj.weight"] = torch.zeros(24, 3, 8, 2)
    message = refusal(state, TINY["g"], tmp_path)
    assert "patch_embed.proj.weight = (24, 3, 8, 2): the model needs the shape (24, 3, 4, 4); take" in message


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_another_rotary_table_is_refused(value: float, tmp_path: Path) -> None:
    state = released_state(TINY["L"])
    name = INFIMM_PREFIX + "blocks.1.attn.rope.freqs_cos"
    state[name][3, 2] += value
    message = refusal(state, TINY["L"], tmp_path)
    assert f"clip.pt: {name} = {value}" in message and "distance from the table" in message and "; take" in message


def test_a_file_without_a_tower_is_refused(tmp_path: Path) -> None:
    message = refusal(TEXT_TOWER, TINY["L"], tmp_path)
    assert "clip.pt = 'cls_token': is there under none of the prefixes" in message
    assert "'visual.'" in message and "take an EVA-CLIP checkpoint" in message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere\.pt': there is no such file; give a"):
        HFFolder.open_file(tmp_path / "nowhere.pt")
