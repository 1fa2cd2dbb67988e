"""The toy bases: what is kept is what the manifest says, small, and able to see and to speak."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaOnevisionForConditionalGeneration,
)

from megavlm.build.data_check import check_data
from megavlm.build.from_folder import run_from_folder
from megavlm.data.chat import ChatConfig, encode_chat
from megavlm.data.sample import Turn
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.toy_world.samples import toy_questions, toy_samples
from megavlm.data.toy_world.world import SAMPLE_KINDS, SPLITS, ToyWorld
from megavlm.model.towers.eva_config import EvaConfig
from megavlm.model.towers.siglip_config import SiglipConfig
from megavlm.recipes import recipe, stages_of
from megavlm.recipes.tiny import EVA, SIGLIP
from megavlm.tiles import patch_rows, plan_image
from megavlm.toy.bases import (
    FAMILY_BASES,
    MANIFEST,
    WEIGHTS,
    aquila_vl_base,
    base_tower,
    decoder_shape,
    write_decoder,
)
from megavlm.toy.data import prepare_toy_data
from megavlm.toy.make import SIGHTS, TILES
from megavlm.toy.quiz import LONGEST_ANSWER, Respondent
from megavlm.toy.seen import PATCH_CLASSES, seen_pictures, seen_tiles
from megavlm.toy.speech import LOOK_BACK, look_back, speech_accuracy, texts
from megavlm.toy.tokenizer import toy_words
from megavlm.toy.tower import Labelled, labelled, tower_features

BUDGET = 8 * 2**20
FOLDER = Path(str(WEIGHTS))


def test_kept_files_are_those_of_the_manifest_and_small() -> None:
    listed = json.loads((FOLDER / MANIFEST).read_text())["files"]
    kept = {path.name: path.read_bytes() for path in FOLDER.glob("*.safetensors")}
    assert kept.keys() == listed.keys()
    for name, content in kept.items():
        assert hashlib.sha256(content).hexdigest() == listed[name]["sha256"], name
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < BUDGET


BOUNDS = {
    "eva": {"colour": 0.9, "shape": 0.9, "character": 0.8},
    "siglip": {"colour": 0.95, "shape": 0.85, "character": 0.3},
}


@pytest.mark.parametrize("config", [EVA, SIGLIP], ids=["eva", "siglip"])
def test_the_towers_tell_colours_shapes_and_characters_of_patches_apart(config: EvaConfig | SiglipConfig) -> None:
    fitted, fresh = (_pictures(config, first, count) for first, count in ((60_000, 400), (70_000, 32)))
    weights = _linear_reading(_features(config, fitted), fitted)
    for name, bound in BOUNDS["eva" if config is EVA else "siglip"].items():
        place = list(PATCH_CLASSES).index(name)
        found = (_features(config, fresh) @ weights[name]).argmax(1)
        shows = fresh.of_patches[:, place] > 0
        assert (found == fresh.of_patches[:, place])[shows].float().mean() > bound, name


def _pictures(config: EvaConfig | SiglipConfig, first: int, count: int) -> Labelled:
    if config is EVA:
        return labelled(seen_pictures("train", first, count, SIGHTS))
    return labelled(seen_tiles("train", first, count, SIGHTS, TILES))


def _features(config: EvaConfig | SiglipConfig, pictures: Labelled) -> torch.Tensor:
    """[patches of all pictures, width + 1]"""
    with torch.no_grad():
        features = tower_features(base_tower(config), pictures.pixels)[0].flatten(0, 1)
    return torch.cat([features, torch.ones(len(features), 1)], dim=1)


def _linear_reading(features: torch.Tensor, pictures: Labelled) -> dict[str, torch.Tensor]:
    """Least squares from features to each label, background patches counted little."""
    found = {}
    for place, (name, classes) in enumerate(PATCH_CLASSES.items()):
        label = pictures.of_patches[:, place]
        weight = torch.where(label > 0, 1.0, 0.05).sqrt()[:, None]
        target = torch.nn.functional.one_hot(label, classes).float()
        found[name] = torch.linalg.lstsq(features * weight, target * weight).solution
    return found


def test_the_decoder_answers_what_it_was_told(tmp_path: Path) -> None:
    decoder = AutoModelForCausalLM.from_pretrained(write_decoder(tmp_path), dtype=torch.float32)
    world = ToyWorld(kinds=("colour", "shape", "position", "reading"))
    assert speech_accuracy(decoder, list(texts(toy_words(), "unseen_combinations", 0, 64, world))) > 0.8


def test_a_fresh_decoder_looks_back_by_distance() -> None:
    config = LlamaConfig(**decoder_shape().to_hf("float32"), attn_implementation="eager")
    decoder = LlamaForCausalLM(config)
    look_back(decoder)
    tokens = torch.randint(config.vocab_size, (2, 40))
    seen = decoder(input_ids=tokens, output_attentions=True).attentions[0]
    for head, distance in enumerate(LOOK_BACK):
        looks = seen[:, head].diagonal(-distance, dim1=-2, dim2=-1)
        assert looks.min().item() > 0.8


@pytest.mark.parametrize("family", FAMILY_BASES)
def test_a_whole_base_starts_the_recipe_on_its_data(family: str, tmp_path: Path) -> None:
    base = FAMILY_BASES[family](tmp_path / "base", 3)
    prepare_toy_data(tmp_path / "data", base, 3, family=family, samples=dict.fromkeys(SAMPLE_KINDS, 5))
    found = run_from_folder(base)
    for stage in stages_of(f"{family}-tiny"):
        name = f"{family}-tiny/{stage}"
        run = recipe(name).override(f"weights.load_hf={base}", f"data.path={tmp_path / 'data'}")
        assert (run.decoder, run.infimm) == (found.decoder, found.infimm)
        if run.aquila_vl is not None and found.aquila_vl is not None:
            assert run.aquila_vl == found.aquila_vl.replace(grid=run.aquila_vl.grid)
        check_data(run)


@pytest.mark.parametrize("family", FAMILY_BASES)
def test_the_same_seed_gives_the_same_base_and_data(family: str, tmp_path: Path) -> None:
    def made(name: str, seed: int) -> dict[str, bytes]:
        base = FAMILY_BASES[family](tmp_path / name / "base", seed)
        prepare_toy_data(tmp_path / name, base, seed, family=family, samples={"chat": 8, "pairs": 3})
        files = sorted([*(tmp_path / name).rglob("*.tar"), base / "model.safetensors"])
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}

    one, same, other = made("one", 1), made("same", 1), made("other", 2)
    assert one == same
    assert all(one[name] != other[name] for name in one)


@torch.no_grad()
def test_transformers_finds_the_kept_parts_in_the_base_of_aquila_vl(tmp_path: Path) -> None:
    base, plain = aquila_vl_base(tmp_path / "base"), write_decoder(tmp_path / "decoder")
    whole, problems = LlavaOnevisionForConditionalGeneration.from_pretrained(
        base, dtype=torch.float32, output_loading_info=True
    )
    assert not problems["missing_keys"] and not problems["unexpected_keys"]
    decoder = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    tokens = torch.randint(decoder_shape().vocab_size, (3, 50))
    said, expected = whole(input_ids=tokens).logits, decoder(input_ids=tokens).logits
    torch.testing.assert_close(said[..., : expected.size(-1)], expected, atol=1e-4, rtol=1e-4)
    pixels = torch.randn(4, 3, 56, 56)
    seen = whole.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(seen, base_tower(SIGLIP)(patch_rows(pixels, 14)), atol=1e-4, rtol=1e-4)


def test_aquila_vl_is_asked_as_it_was_trained(tmp_path: Path) -> None:
    base = aquila_vl_base(tmp_path / "base")
    read, respondent = Tokenizer(base), Respondent(base)
    parts = recipe("aquila-vl-tiny/4").aquila_vl
    assert parts is not None
    asked = [question for _, question in toy_questions("reading", "unseen_pictures", 0, 3)]
    pictures = [Image.new("RGB", size) for size in ((64, 64), (200, 64), (30, 90))]
    inputs = respondent.inputs([question.text for question in asked], pictures)
    for question, picture, tokens, mask in zip(
        asked, pictures, inputs["input_ids"], inputs["attention_mask"], strict=True
    ):
        turn = Turn("user", f"<image>\n{question.text}")
        expected = encode_chat([turn], read, ChatConfig(template="chatml"), open_answer=True).tokens
        width, height = picture.size
        count = plan_image(width, height, "image", parts.grid).tokens
        repeats = np.where(expected == parts.image_token_id, count, 1)
        assert tokens[mask.bool()].tolist() == expected.repeat(repeats).tolist()
    answers = respondent.answers([question.text for question in asked], pictures)
    assert all(answer and len(answer.split()) <= LONGEST_ANSWER for answer in answers)
    assert len(respondent.answers([asked[0].text], None)) == 1


@pytest.mark.parametrize("kind", SAMPLE_KINDS)
def test_the_tokenizer_knows_every_word_and_loses_none(kind: str) -> None:
    words = toy_words()
    for split in SPLITS:
        for sample in toy_samples(kind, split, 0, 40):  # type: ignore[arg-type]
            for text in [sample.text.replace("<image>", ""), *(turn.text for turn in sample.turns)]:
                tokens, spans = words.encode_with_spans(text, surround=False)
                assert 0 not in tokens
                assert "".join(text[begin:end] for begin, end in spans) == text
                assert words.decode(tokens.tolist()) == text.replace("<image>", "")
