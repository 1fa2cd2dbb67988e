"""Aquila-VL folders: read in all spellings, written by every layout, put together from parts, used by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from aquila_folders import (
    IMAGE,
    ROWS,
    VIDEO,
    assert_equal_tensors,
    folder_tensors,
    next_config,
    next_tensors,
    processor_of,
    tiny_model,
    write_next_folder,
)
from image_sizes import random_sizes
from qwen_hf import tiny_tokenizer, write_tokenizer
from tiny_aquila import GRIDS
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from megavlm.build.from_folder import run_from_folder
from megavlm.build.model import build_model
from megavlm.build.run_config import ParallelConfig, PrecisionConfig
from megavlm.data.chat import Encoded
from megavlm.data.splice import Medium, spliced_sample
from megavlm.data.tile_images import tile_pixels
from megavlm.data.tokenizer import Tokenizer
from megavlm.export.aquila_vl_assemble import assemble_aquila_vl, normalise_aquila_vl
from megavlm.export.hf_export import export_model
from megavlm.parallel import groups as process_groups
from megavlm.testing import spawn
from megavlm.tiles import MediaKind, patch_rows, plan_image

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP=2": (2, {"tensor_model_parallel_size": 2}),
    "PP=2": (2, {"pipeline_model_parallel_size": 2}),
    "TP=2 x PP=2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models in bfloat16, tied and not, as LLaVA-NeXT keeps them, and as ours; `tied` and `untied`."""
    root = tmp_path_factory.mktemp("aquila")
    for name, tied in (("tied", True), ("untied", False)):
        model = tiny_model(root / name / "start", tied)
        write_next_folder(root / name / "original", next_tensors(model), next_config(model))
        normalise_aquila_vl(root / name / "original", root / name / "ours", torch.bfloat16)
    return root


def export_under(degrees: dict[str, Any], jobs: list[tuple[str, str, Literal["transformers", "llava-next"]]]) -> None:
    """Write each folder (from, to, spelling) again."""
    process_groups.join()
    parallel = ParallelConfig(**degrees)
    groups = process_groups.start(parallel)
    for source, out, layout in jobs:
        run = run_from_folder(source).replace(
            parallel=parallel, precision=PrecisionConfig(params_dtype="bfloat16"), make_vocab_size_divisible_by=7
        )
        export_model(build_model(run, groups), run, groups, out, tokenizer_from=source, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trips_give_back_every_bit(layout: str, originals: Path, tmp_path: Path) -> None:
    world_size, degrees = LAYOUTS[layout]
    kinds = ("tied", "untied")
    there = [(f"{originals}/{kind}/ours", f"{tmp_path}/{kind}-next", "llava-next") for kind in kinds]
    there += [(f"{originals}/{kind}/ours", f"{tmp_path}/{kind}-hf", "transformers") for kind in kinds]
    spawn(export_under, world_size, degrees, there)
    for kind in kinds:
        original = folder_tensors(originals / kind / "original")
        del original["model.layers.1.self_attn.rotary_emb.inv_freq"]
        assert_equal_tensors(folder_tensors(tmp_path / f"{kind}-next"), original)
        assert_equal_tensors(folder_tensors(tmp_path / f"{kind}-hf"), folder_tensors(originals / kind / "ours"))
        load_as_users_do(tmp_path / f"{kind}-hf", kind == "tied").save_pretrained(tmp_path / f"{kind}-saved")
        AutoTokenizer.from_pretrained(tmp_path / f"{kind}-hf").save_pretrained(tmp_path / f"{kind}-saved")
    spawn(
        export_under,
        world_size,
        degrees,
        [(f"{tmp_path}/{kind}-saved", f"{tmp_path}/{kind}-back", "llava-next") for kind in kinds],
    )
    for kind in kinds:
        assert_equal_tensors(folder_tensors(tmp_path / f"{kind}-back"), folder_tensors(tmp_path / f"{kind}-next"))
        config, back = (
            json.loads((tmp_path / f"{kind}-{end}" / "config.json").read_text()) for end in ("next", "back")
        )
        assert back == config


def load_as_users_do(folder: Path, tied: bool) -> LlavaOnevisionForConditionalGeneration:
    model, said = LlavaOnevisionForConditionalGeneration.from_pretrained(
        folder, dtype="auto", output_loading_info=True, local_files_only=True
    )
    assert not any(said.values()), said
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert (model.config.image_token_id, model.config.video_token_id) == (IMAGE, VIDEO)
    return model


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_an_imported_folder_computes_what_the_original_did(kind: str, originals: Path) -> None:
    """As written text and images go through the folder's own processor."""
    processor = processor_of(originals / kind / "ours")
    picture = np.random.default_rng(1).integers(0, 256, (150, 230, 3), dtype=np.uint8)
    content = [{"type": "text", "text": "What is this?"}, {"type": "image"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=picture, text=text, return_tensors="pt")
    assert int((inputs["input_ids"] == IMAGE).sum()) == plan_image(230, 150, "image", GRIDS["2b"]).tokens
    first, now = (
        LlavaOnevisionForConditionalGeneration.from_pretrained(originals / kind / name, dtype=torch.float32).eval()
        for name in ("start", "ours")
    )
    with torch.no_grad():
        assert torch.equal(first(**inputs).logits, now(**inputs).logits)


def test_pixels_and_tokens_of_the_processor_are_ours(originals: Path) -> None:
    processor, grid = processor_of(originals / "tied" / "ours"), GRIDS["2b"]
    tokenizer = Tokenizer(originals / "tied" / "ours")
    draw = np.random.default_rng(2)
    used = grid.tokens_per_side * grid.patch_size
    farthest = 0.0
    for index, (width, height) in enumerate(zip(*(side % 320 + 1 for side in random_sizes(200, seed=2)), strict=True)):
        picture = draw.integers(0, 256, (int(height), int(width), 3), dtype=np.uint8)
        kind: MediaKind = "one_of_several" if index % 5 == 4 else "image"
        pictures = [picture] if kind == "image" else [picture, picture[:1, :1]]
        text = "<image>\nWhat is this? " * len(pictures)
        made = processor(images=[pictures], text=text, input_data_format="channels_last", return_tensors="pt")
        words = np.array(tokenizer.encode(text), np.int64)
        media = [Medium("image", one.shape[1], one.shape[0]) for one in pictures]
        sample = spliced_sample(Encoded(words, words), media, grid, IMAGE, VIDEO)
        assert made["input_ids"][0].tolist() == sample.tokens.tolist(), (width, height)
        plan = sample.plans[0]
        seen = made["pixel_values"][0, :, :, :used, :used]
        assert len(seen) == plan.tiles
        ours = tile_pixels(plan, picture)
        farthest = max(farthest, float((ours - patch_rows(seen, grid.patch_size)).abs().max()) / 2)
    assert farthest <= 1 / 255 + 1e-6


def test_every_spelling_of_the_output_layer(originals: Path, tmp_path: Path) -> None:
    """Stored with the embedding's values, with others, or not at all; config.json need not have noticed."""
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(originals / "untied" / "start", dtype="auto")
    tensors, config = next_tensors(model), next_config(model)
    embedding = tensors["model.embed_tokens.weight"]
    heads = {"own": (tensors["lm_head.weight"], False), "equal": (embedding.clone(), True), "absent": (None, True)}
    for name, (head, tied) in heads.items():
        held = {key: tensor for key, tensor in tensors.items() if key != "lm_head.weight"}
        held |= {} if head is None else {"lm_head.weight": head}
        write_next_folder(tmp_path / name, held, config)
        normalise_aquila_vl(tmp_path / name, tmp_path / f"{name}-ours", torch.bfloat16)
        made = folder_tensors(tmp_path / f"{name}-ours")
        assert torch.equal(made["language_model.lm_head.weight"], embedding if head is None else head)
        assert run_from_folder(tmp_path / f"{name}-ours").decoder.tied_embeddings == tied
        load_as_users_do(tmp_path / f"{name}-ours", tied)


def test_pickled_weights_and_runtime_names(originals: Path, tmp_path: Path) -> None:
    """A .bin, and tensors named as transformers' modules are."""
    source = originals / "untied"
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(source / "start", dtype="auto")
    for name, tensors in (("bin", folder_tensors(source / "original")), ("runtime", model.state_dict())):
        (tmp_path / name).mkdir()
        torch.save(tensors, tmp_path / name / "pytorch_model.bin")
        config = source / ("original" if name == "bin" else "ours") / "config.json"
        (tmp_path / name / "config.json").write_bytes(config.read_bytes())
        write_tokenizer(tmp_path / name, media_tokens=name == "runtime")
        normalise_aquila_vl(tmp_path / name, tmp_path / f"{name}-ours", torch.bfloat16)
        assert_equal_tensors(folder_tensors(tmp_path / f"{name}-ours"), folder_tensors(source / "ours"))


def language_folder(folder: Path, rows: int, tied: bool) -> Qwen2ForCausalLM:
    torch.manual_seed(4)
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=rows,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        eos_token_id=IMAGE - 1,
    )
    model = Qwen2ForCausalLM(config).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder, media_tokens=False)
    return model


def siglip_folder(folder: Path, whole: bool) -> dict[str, Tensor]:
    """A published folder, its vision half alone or the whole model; the tensors of its tower."""
    torch.manual_seed(5)
    vision = SiglipVisionConfig(
        hidden_size=36, intermediate_size=68, num_hidden_layers=3, num_attention_heads=2, image_size=98, patch_size=14
    )
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = SiglipTextConfig(**small, vocab_size=5, projection_size=36)
    model = SiglipModel(SiglipConfig(vision_config=vision.to_dict(), text_config=text.to_dict()))
    (model if whole else model.vision_model).save_pretrained(folder)
    return {name.removeprefix("vision_model."): tensor for name, tensor in model.vision_model.state_dict().items()}


@pytest.mark.parametrize(
    ("rows", "tied", "whole"), [(ROWS, True, True), (IMAGE, False, False), (IMAGE + 1, True, True)]
)
def test_put_together_from_parts(rows: int, tied: bool, whole: bool, tmp_path: Path) -> None:
    bare = language_folder(tmp_path / "llm", rows, tied)
    eyes = siglip_folder(tmp_path / "siglip", whole)
    assemble_aquila_vl(tmp_path / "llm", tmp_path / "siglip", tmp_path / "out", dtype=torch.float32, seed=3)
    made = folder_tensors(tmp_path / "out")
    for name, tensor in bare.state_dict().items():
        assert torch.equal(made[f"language_model.{name}"][: len(tensor)], tensor), name
    towers = {name.removeprefix("vision_tower.vision_model."): t for name, t in made.items() if "vision_tower" in name}
    assert not any("layers.2." in name or "head." in name for name in towers) and len(towers) == 37
    assert all(torch.equal(tensor, eyes[name]) for name, tensor in towers.items())
    assert made["multi_modal_projector.linear_1.weight"].abs().max() <= 36**-0.5
    assert made["image_newline"].std() == pytest.approx(32**-0.5, rel=0.5)

    model = load_as_users_do(tmp_path / "out", tied).eval()
    tokens = torch.tensor([tiny_tokenizer(False)("Where is the red square?")["input_ids"]])
    with torch.no_grad():
        found, expected = model(input_ids=tokens).logits, bare(input_ids=tokens).logits
    assert model.config.text_config.vocab_size == max(rows, VIDEO + 1)
    torch.testing.assert_close(found[..., :rows], expected, atol=1e-6, rtol=0)
    assert torch.equal(found.argmax(-1), expected.argmax(-1)), "a new row is never the most likely"
