"""The toy bases: what is kept is what the manifest says, small, and able to see and to speak."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megavlm.build.data_check import check_data
from megavlm.build.from_folder import run_from_folder
from megavlm.data.toy_world.samples import toy_samples
from megavlm.data.toy_world.world import SAMPLE_KINDS, SPLITS, ToyWorld
from megavlm.recipes import recipe
from megavlm.toy.bases import MANIFEST, WEIGHTS, base_tower, decoder_shape, infimm_base, write_decoder
from megavlm.toy.data import prepare_toy_data
from megavlm.toy.make import SIGHTS
from megavlm.toy.seen import PATCH_CLASSES, seen_pictures
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


def test_the_tower_tells_colours_shapes_and_characters_of_patches_apart() -> None:
    fitted, fresh = (
        labelled(seen_pictures("train", first, count, SIGHTS)) for first, count in ((60_000, 400), (70_000, 32))
    )
    weights = _linear_reading(_features(fitted), fitted)
    for name, bound in {"colour": 0.9, "shape": 0.9, "character": 0.8}.items():
        place = list(PATCH_CLASSES).index(name)
        found = (_features(fresh) @ weights[name]).argmax(1)
        shows = fresh.of_patches[:, place] > 0
        assert (found == fresh.of_patches[:, place])[shows].float().mean() > bound, name


def _features(pictures: Labelled) -> torch.Tensor:
    """[patches of all pictures, width + 1]"""
    with torch.no_grad():
        features = tower_features(base_tower(), pictures.pixels)[0].flatten(0, 1)
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


def test_a_whole_base_starts_the_recipe_on_its_data(tmp_path: Path) -> None:
    base = infimm_base(tmp_path / "base", seed=3)
    prepare_toy_data(tmp_path / "data", base, 3, samples=dict.fromkeys(SAMPLE_KINDS, 5))
    found = run_from_folder(base)
    for stage in ("pretrain", "multitask", "finetune"):
        run = recipe(f"infimm-tiny/{stage}").override(f"weights.load_hf={base}", f"data.path={tmp_path / 'data'}")
        assert (run.decoder, run.infimm) == (found.decoder, found.infimm)
        check_data(run)


def test_the_same_seed_gives_the_same_base_and_data(tmp_path: Path) -> None:
    def made(name: str, seed: int) -> dict[str, bytes]:
        base = infimm_base(tmp_path / name / "base", seed=seed)
        prepare_toy_data(tmp_path / name, base, seed, samples={"chat": 8, "pairs": 3})
        files = sorted([*(tmp_path / name).rglob("*.tar"), base / "model.safetensors"])
        return {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}

    one, same, other = made("one", 1), made("same", 1), made("other", 2)
    assert one == same
    assert all(one[name] != other[name] for name in one)


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
