"""The modelling code of exported InfiMM folders, run by transformers: golden values, masks, generation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from eva_cases import TINY, loaded_tower, random_images, released_state
from infimm_hf import GOLDEN, MODEL_TYPES, golden_config, golden_folder, load, offline, visual_settings, write_folder
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor, MistralForCausalLM

from megavlm.model.towers.eva_config import eva_tower
from megavlm.model.towers.eva_state_map import INFIMM_PREFIX
from megavlm.testing import assert_gradients_close, assert_logits_close, assert_losses_close
from megavlm.tiles import patch_rows

IMAGE, PAD = 127, 2
CASES = ("one_image", "interleaved_text_first", "one_sample_without_image", "training_step")
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("hf")
    with offline(root / "modules"):
        yield golden_folder(root / "golden")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder).eval()


@pytest.fixture(scope="module")
def cases() -> dict[str, Tensor]:
    return load_file(GOLDEN / "cases.safetensors")


def random_pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


def prompt(length: int, image_at: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    """[1, length]: words, and images at these places."""
    ids = torch.randint(3, 126, (1, length), generator=torch.Generator().manual_seed(seed))
    ids[0, list(image_at)] = IMAGE
    return ids


def generated(model: Any, ids: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The new tokens [B, steps] and their logits [B, steps, V]; greedy, and never at an end."""
    arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": STEPS, **arguments}
    out = model.generate(
        input_ids=ids, eos_token_id=-1, pad_token_id=PAD, output_logits=True, return_dict_in_generate=True, **arguments
    )
    return out.sequences[:, ids.size(1) :], torch.stack(out.logits, dim=1)


def recorded(module: torch.nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    """What a module gave in each of its calls."""
    found: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: found.append(output.detach()))
    try:
        run()
    finally:
        hook.remove()
    return found


# --- weights and golden values --------------------------------------------------------------------------------------


def test_released_names_are_taken_and_given_back(folder: Path) -> None:
    model, report = load(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    released = load_file(GOLDEN / "model.safetensors")
    tables = {name for name in released if "rope.freqs_" in name}
    state = model.state_dict()
    assert tables and state.keys() == released.keys() - tables
    assert all(torch.equal(state[name], released[name]) for name in state)


@pytest.mark.parametrize("case", CASES)
def test_golden_logits(model: Any, cases: dict[str, Tensor], case: str) -> None:
    images = cases[f"{case}.images"]
    with torch.no_grad():
        logits = model(input_ids=cases[f"{case}.input_ids"], images=images).logits
        same = model(input_ids=cases[f"{case}.input_ids"], pixel_values=images.unsqueeze(2)).logits
    assert_logits_close(logits, cases[f"{case}.logits"])
    assert torch.equal(logits, same)


def test_golden_loss_and_gradients(folder: Path, cases: dict[str, Tensor]) -> None:
    model = load(folder).train()
    case = {name.removeprefix("training_step."): value for name, value in cases.items()}
    loss = model(input_ids=case["input_ids"], images=case["images"], labels=case["labels"]).loss
    loss.backward()
    assert_losses_close(loss.item(), case["loss"].item())
    expected = {name.removeprefix("grad."): value for name, value in case.items() if name.startswith("grad.")}
    mine = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_gradients_close({name: mine[name] for name in expected}, expected)
    assert not any(name.startswith(INFIMM_PREFIX) for name in mine)


def test_the_tower_trains_when_asked(folder: Path) -> None:
    model = load(folder)
    assert not any(p.requires_grad for p in model.model.vision_encoder.parameters())
    model.model.vision_encoder.requires_grad_(True)
    ids = prompt(6, image_at=(1,))
    model(input_ids=ids, images=random_pixels(1, 1), labels=ids).loss.backward()
    assert model.model.vision_encoder.patch_embed.proj.weight.grad.norm() > 0


@pytest.mark.parametrize("kind", ["L", "g", "E"])
def test_towers_equal_ours(model: Any, kind: str, tmp_path: Path) -> None:
    config, state = TINY[kind], released_state(TINY[kind])
    theirs = type(model.model.vision_encoder)(visual_settings(config))
    theirs.load_state_dict({k.removeprefix(INFIMM_PREFIX): v for k, v in state.items() if "rope.freqs_" not in k})
    images = random_images(config, 3)
    with torch.no_grad():
        ours = loaded_tower(config, state, tmp_path)(patch_rows(images, config.patch_size))
        assert_logits_close(theirs(images), ours, 1e-5)


@pytest.mark.parametrize(
    ("model_type", "tower"),
    [
        ("infimm-vicuna", {"postnorm": True}),
        ("infimm-llama", {}),
        ("infimm-zephyr", {"rope": True, "subln": True, "naiveswiglu": True}),
    ],
)
def test_fresh_models_survive_a_round_trip(
    folder: Path, tmp_path: Path, model_type: str, tower: dict[str, Any]
) -> None:
    plain = {"rope": False, "subln": False, "naiveswiglu": False}
    visual = {**golden_config()["visual"], **plain, **tower}
    config = golden_config(model_type, visual=visual, cross_attn_every_n_layers=4)
    source = write_folder(tmp_path / "fresh", config)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(source, trust_remote_code=True), trust_remote_code=True
    ).eval()
    gates = model.model.lang_encoder.model.layers[3].gated_cross_attn_layer
    assert gates.attn_gate.item() == gates.ff_gate.item() == 0
    with torch.no_grad():
        gates.attn_gate.fill_(1)
        gates.ff_gate.fill_(-1)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved").eval()
    assert (again.config.model_type, type(again).__name__) == (model_type, type(model).__name__)
    assert again.config.language.model_type == ("mistral" if model_type == "infimm-zephyr" else "llama")
    inputs = {"input_ids": prompt(7, image_at=(2,)), "pixel_values": random_pixels(1, 1)}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


_LLAMA_13B = {
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "intermediate_size": 13824,
    "vocab_size": 32002,
    "head_dim": 128,
}
_MISTRAL_7B = {
    **_LLAMA_13B,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
}


@pytest.mark.parametrize(
    ("model_type", "tower", "language", "every", "expected"),
    [
        ("infimm-zephyr", "EVA02-CLIP-L/14-336", _MISTRAL_7B, 2, 9_840_832_224),
        ("infimm-vicuna", "EVA02-CLIP-E/14-224", _LLAMA_13B, 4, 19_710_920_980),
        ("infimm-llama", "EVA01-CLIP-g/14-224", _LLAMA_13B, 4, 16_305_280_660),
    ],
)
def test_published_sizes(
    folder: Path, tmp_path: Path, model_type: str, tower: str, language: dict[str, Any], every: int, expected: int
) -> None:
    config = golden_config(model_type, visual=visual_settings(eva_tower(tower)), cross_attn_every_n_layers=every)
    config["language"] |= language
    source = AutoConfig.from_pretrained(write_folder(tmp_path / "real", config), trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source, trust_remote_code=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


# --- who sees what --------------------------------------------------------------------------------------------------


def bare_language_model(model: Any) -> Any:
    """transformers' Mistral with the same weights, and nothing of InfiMM."""
    bare = MistralForCausalLM(model.config.language).eval()
    prefix = "model.lang_encoder."
    state = {name.removeprefix(prefix): value for name, value in model.state_dict().items() if name.startswith(prefix)}
    bare.load_state_dict(
        {k.replace(".decoder_layer.", "."): v for k, v in state.items() if ".gated_cross_attn_layer." not in k}
    )
    return bare


@torch.no_grad()
def test_text_alone_equals_the_bare_language_model(model: Any) -> None:
    bare = bare_language_model(model)
    text, with_image = prompt(9, seed=1), prompt(9, image_at=(3,), seed=2)
    assert torch.equal(model(input_ids=text).logits, bare(input_ids=text).logits)
    both = torch.cat([text, with_image])
    mine, theirs = model(input_ids=both, images=random_pixels(2, 1)).logits, bare(input_ids=both).logits
    assert torch.equal(mine[0], theirs[0])
    assert (mine[1, 3:] - theirs[1, 3:]).abs().max() > 0.1
    assert torch.equal(generated(model, text)[0], generated(bare, text)[0])


@torch.no_grad()
def test_each_token_sees_the_image_before_it(model: Any) -> None:
    ids, images = prompt(12, image_at=(3, 7)), random_pixels(1, 2)
    other = torch.cat([random_pixels(1, 1, seed=5), images[:, 1:]], dim=1)
    gated = model.model.lang_encoder.model.layers[1].gated_cross_attn_layer
    before, after = (recorded(gated.attn, partial(model, input_ids=ids, images=i))[0][0] for i in (images, other))
    assert torch.equal(before[:3], torch.zeros_like(before[:3]))
    assert (before[3:7] - after[3:7]).abs().amax(dim=-1).min() > 1e-3
    assert torch.equal(before[7:], after[7:])
    (forwarded,) = recorded(gated.ff, lambda: model(input_ids=ids, images=images))
    assert forwarded[0, :3].abs().amax(dim=-1).min() > 1e-3


@torch.no_grad()
def test_images_behind_a_samples_own_are_inert(model: Any) -> None:
    ids = torch.cat([prompt(8, image_at=(1, 4)), prompt(8, image_at=(2,), seed=1)])
    images = random_pixels(2, 3)
    broken = images.clone()
    broken[0, 2], broken[1, 1:] = torch.nan, torch.nan
    assert torch.equal(model(input_ids=ids, images=images).logits, model(input_ids=ids, images=broken).logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model: Any, side: str) -> None:
    ids, images = prompt(7, image_at=(2,)), random_pixels(1, 1)
    pad = (4, 0) if side == "left" else (0, 4)
    padded = torch.nn.functional.pad(ids, pad, value=PAD)
    mask = torch.nn.functional.pad(torch.ones_like(ids), pad)
    logits = model(input_ids=padded, attention_mask=mask, images=images).logits
    assert_logits_close(logits[mask.bool()][None], model(input_ids=ids, images=images).logits, 1e-5)


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        ({"images": random_pixels(2, 1)}, "sample 1 has 2 <image> tokens and 1 images: pass one image for each"),
        ({}, "sample 1 has 2 <image> tokens and 0 images: pass one image for each"),
        ({"images": random_pixels(2, 2)[..., :28]}, r"shape \[2, 2, 3, 56, 28\]: must be \[2 samples, images, 3, 56"),
        ({"images": random_pixels(1, 2)}, r"shape \[1, 2, 3, 56, 56\]: must be \[2 samples"),
        ({"images": random_pixels(2, 2), "pixel_values": random_pixels(2, 2)}, "pass one of them"),
    ],
)
def test_images_that_do_not_fit_are_refused(model: Any, images: dict[str, Tensor], problem: str) -> None:
    ids = torch.cat([prompt(8, image_at=(1,)), prompt(8, image_at=(2, 5))])
    with pytest.raises(ValueError, match=problem):
        model(input_ids=ids, **images)
    with pytest.raises(ValueError, match=problem):
        model.generate(input_ids=ids, max_new_tokens=2, **images)


# --- generation -----------------------------------------------------------------------------------------------------


def ragged_batch() -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Three prompts with two, no and one image, alone and as one batch padded on the left."""
    prompts = [prompt(11, image_at=(1, 6)), prompt(5, seed=1), prompt(8, image_at=(3,), seed=2)]
    images = [random_pixels(1, count, seed=count) for count in (2, 0, 1)]
    pads = [(11 - one.size(1), 0) for one in prompts]
    return (
        prompts,
        images,
        {
            "ids": torch.cat([torch.nn.functional.pad(o, p, value=PAD) for o, p in zip(prompts, pads, strict=True)]),
            "attention_mask": torch.cat(
                [torch.nn.functional.pad(torch.ones_like(o), p) for o, p in zip(prompts, pads, strict=True)]
            ),
            "pixel_values": torch.cat(
                [torch.cat([one, torch.zeros(1, 2 - one.size(1), 3, 56, 56)], dim=1) for one in images]
            ),
        },
    )


def test_the_cache_changes_nothing(model: Any, cases: dict[str, Tensor]) -> None:
    ids, images = cases["interleaved_text_first.input_ids"], cases["interleaved_text_first.images"]
    with_cache, without_cache = (generated(model, ids, images=images, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache[0], without_cache[0])
    assert_logits_close(with_cache[1], without_cache[1], 1e-5)
    with torch.no_grad():
        whole = model(input_ids=torch.cat([ids, with_cache[0][:, :-1]], dim=1), images=images).logits
    assert_logits_close(with_cache[1], whole[:, -STEPS:], 1e-5)


def test_a_batch_equals_its_samples_alone(model: Any) -> None:
    prompts, images, batch = ragged_batch()
    tokens, logits = generated(model, **batch)
    for i, (ids, pixels) in enumerate(zip(prompts, images, strict=True)):
        alone = generated(model, ids, **({"pixel_values": pixels} if pixels.size(1) else {}))
        assert torch.equal(alone[0][0], tokens[i])
        assert_logits_close(alone[1][0], logits[i], 1e-5)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2, "use_cache": False}])
def test_beams_of_a_batch_equal_those_of_its_samples(model: Any, how: dict[str, Any]) -> None:
    prompts, images, batch = ragged_batch()
    ids = batch.pop("ids")
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": PAD, **how}
    count = how.get("num_return_sequences", 1)
    together = model.generate(input_ids=ids, **batch, **how)[:, ids.size(1) :].unflatten(0, (3, count))
    for i, (one, pixels) in enumerate(zip(prompts, images, strict=True)):
        inputs = {"pixel_values": pixels} if pixels.size(1) else {}
        alone = model.generate(input_ids=one, attention_mask=torch.ones_like(one), **inputs, **how)
        assert torch.equal(alone[:, one.size(1) :], together[i])


def test_every_returned_sequence_sees_its_images(model: Any) -> None:
    _, _, batch = ragged_batch()
    once = generated(model, **batch)[1][:, 0]
    drawn = generated(model, **batch, do_sample=True, top_k=0, num_return_sequences=3)[1][:, 0]
    assert_logits_close(drawn, once.repeat_interleave(3, dim=0), 1e-5)


def test_images_are_encoded_once_and_projected_once(model: Any) -> None:
    _, _, batch = ragged_batch()
    tower = model.model.vision_encoder
    to_kv = model.model.lang_encoder.model.layers[1].gated_cross_attn_layer.attn.to_kv
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "do_sample": True}]
    for how in ways:
        (features,) = recorded(tower, partial(generated, model, **batch, **how))
        assert features.size(0) == 3, "the real images, and none for padding or beams"
    assert len(recorded(to_kv, lambda: generated(model, **batch))) == 1


def test_calls_do_not_see_each_other(model: Any, folder: Path) -> None:
    ids, text = prompt(9, image_at=(2,)), prompt(9, seed=3)
    first = generated(model, ids, images=random_pixels(1, 1))[1]
    second = generated(model, ids, images=random_pixels(1, 1, seed=7))[1]
    third = generated(model, text)[1]
    fresh = load(folder).eval()
    assert (first - second).abs().max() > 0.1
    assert torch.equal(third, generated(fresh, text)[1])
    assert torch.equal(second, generated(fresh, ids, images=random_pixels(1, 1, seed=7))[1])


@torch.no_grad()
def test_steps_by_hand_see_the_last_image(model: Any) -> None:
    ids, images = prompt(12, image_at=(1, 5)), random_pixels(1, 2)
    whole = model(input_ids=ids, images=images).logits
    start = model(input_ids=ids[:, :8], images=images, use_cache=True)
    model(input_ids=ids[:, :8], images=random_pixels(1, 2, seed=9), use_cache=True)  # another conversation, meanwhile
    rest = model(input_ids=ids[:, 8:], past_key_values=start.past_key_values)
    assert_logits_close(torch.cat([start.logits, rest.logits], dim=1), whole, 1e-5)


@torch.no_grad()
def test_positions_are_passed_on(model: Any) -> None:
    ids = prompt(6)
    spread = model(input_ids=ids, position_ids=3 * torch.arange(6)[None]).logits
    assert_logits_close(
        spread, bare_language_model(model)(input_ids=ids, position_ids=3 * torch.arange(6)[None]).logits
    )
    assert (spread - model(input_ids=ids).logits).abs().max() > 1e-3


class SayImage(LogitsProcessor):
    """Makes the model write `<image>` at every other step."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.size(1) % 2:
            scores[:, IMAGE] = 1e4
        return scores


def test_an_image_tag_of_the_models_own_shows_nothing_new(model: Any) -> None:
    _, _, batch = ragged_batch()
    with_cache, without_cache = (
        generated(model, **batch, logits_processor=[SayImage()], use_cache=use) for use in (True, False)
    )
    assert (with_cache[0] == IMAGE).any()
    assert torch.equal(with_cache[0], without_cache[0])
    assert_logits_close(with_cache[1], without_cache[1], 1e-5)


def test_bfloat16_stays_near(folder: Path, cases: dict[str, Tensor]) -> None:
    model = load(folder, dtype=torch.bfloat16).eval()
    ids, images = cases["one_image.input_ids"], cases["one_image.images"]
    with torch.no_grad():
        logits = model(input_ids=ids, images=images).logits
    assert logits.dtype == torch.bfloat16
    assert_logits_close(logits, cases["one_image.logits"], 0.1)
    assert generated(model, ids, images=images)[0].shape == (2, STEPS)


def test_gradient_checkpointing_changes_nothing(folder: Path, cases: dict[str, Tensor]) -> None:
    inputs = {name: cases[f"training_step.{name}"] for name in ("input_ids", "images", "labels")}
    gradients = []
    for checkpointing in (False, True):
        model = load(folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_gradients_close(gradients[1], gradients[0], 1e-6)


# --- as a user does it ----------------------------------------------------------------------------------------------

_USER = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from PIL import Image
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
question = [{"type": "image", "image": Image.new("RGB", (80, 60), "red")}, {"type": "text", "text": "What is it?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=True)
tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
print(AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type, model.dtype)
print(len(AutoTokenizer.from_pretrained(folder, trust_remote_code=True)), list(inputs["pixel_values"].shape))
print(tokens.size(1) - inputs["input_ids"].size(1), [name for name in sys.modules if name.startswith("megavlm")])
"""


def test_it_works_in_an_interpreter_of_its_own(folder: Path, tmp_path: Path) -> None:
    keep = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment = {**keep, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _USER, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["infimm-zephyr torch.float32", "128 [1, 1, 3, 56, 56]", "4 []"]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_configurations_keep_their_type(folder: Path, tmp_path: Path, model_type: str) -> None:
    config = AutoConfig.from_pretrained(
        write_folder(tmp_path / "source", golden_config(model_type)), trust_remote_code=True
    )
    config.save_pretrained(tmp_path / "saved")
    again = AutoConfig.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert again.model_type == model_type
    place = {"_name_or_path": None}
    assert again.to_dict() | place == config.to_dict() | place
    assert again.get_text_config(decoder=True).vocab_size == 128


def test_a_decoder_that_is_none_of_ours_is_refused(folder: Path, tmp_path: Path) -> None:
    config = golden_config()
    source = write_folder(tmp_path / "source", {**config, "language": {**config["language"], "model_type": "mamba"}})
    with pytest.raises(ValueError, match="language.model_type = 'mamba': use one of mistral, llama"):
        AutoConfig.from_pretrained(source, trust_remote_code=True)
