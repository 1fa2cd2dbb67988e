"""The processor of exported InfiMM folders: pixel values, batches of text and pictures, chat formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from infimm_hf import golden_config, offline, write_folder
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIZE = 56
BOS, PAD, EOC, IMAGE = 1, 2, 126, 127


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("hf")
    with offline(root / "modules"):
        kinds = ("infimm-zephyr", "infimm-vicuna", "infimm-llama")
        yield {kind: write_folder(root / kind, golden_config(kind)) for kind in kinds}


@pytest.fixture(scope="module")
def processor(folders: dict[str, Path]) -> Any:
    return AutoProcessor.from_pretrained(folders["infimm-zephyr"], trust_remote_code=True)


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


def formula(square: Image.Image) -> Tensor:
    """Pixel values of a picture that is cut already, channel by channel."""
    values = np.asarray(square.convert("RGB")).astype(np.float32) / np.float32(255)
    channels = [
        (values[..., c] - np.float32(mean)) / np.float32(std)
        for c, (mean, std) in enumerate(zip(MEAN, STD, strict=True))
    ]
    return torch.from_numpy(np.stack(channels))


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize(
    ("width", "height", "resized", "corner"),
    [
        (80, 60, (74, 56), (9, 0)),  # int(56 * 80 / 60) = 74
        (60, 80, (56, 74), (0, 9)),
        (101, 50, (113, 56), (28, 0)),  # 28.5 is rounded to the even 28
        (103, 50, (115, 56), (30, 0)),  # 29.5 as well, to 30
        (56, 56, (56, 56), (0, 0)),
        (20, 30, (56, 84), (0, 14)),
    ],
)
def test_pixel_values_equal_the_formula(
    processor: Any, mode: str, width: int, height: int, resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    picture = noise(width, height, mode)
    scaled = picture.resize(resized, Image.Resampling.BICUBIC)
    left, top = corner
    expected = formula(scaled.crop((left, top, left + SIZE, top + SIZE)))
    mine = processor.image_processor(picture)["pixel_values"]
    assert mine.dtype == torch.float32
    assert torch.equal(mine, expected[None])


def test_rgb_comes_behind_the_resize(processor: Any) -> None:
    picture = noise(80, 60, "P")
    mine, converted = (processor.image_processor(p)["pixel_values"] for p in (picture, picture.convert("RGB")))
    assert not torch.allclose(mine, converted, atol=0.1), "a palette is not interpolated"


def test_arrays_and_lists_of_pictures(processor: Any) -> None:
    picture = noise(80, 60)
    pixels = processor.image_processor([picture, np.asarray(picture)])["pixel_values"]
    assert pixels.shape == (2, 3, SIZE, SIZE)
    assert torch.equal(pixels[0], pixels[1])
    with pytest.raises(TypeError, match="a picture is a Tensor: pass a PIL image or an array of bytes"):
        processor.image_processor(torch.zeros(3, 8, 8))


# --- text and pictures ----------------------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_left_and_with_empty_pictures(processor: Any, tmp_path: Path) -> None:
    first, second, third = noise(80, 60), noise(60, 80, seed=1), noise(56, 56, seed=2)
    third.save(tmp_path / "third.png")
    texts = ["<image>A and <image>B", "no picture", "<image>C is the longest of these three texts"]
    nested = processor(text=texts, images=[[first, second], [], [str(tmp_path / "third.png")]])
    flat = processor(text=texts, images=[first, second, third])
    assert nested.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(nested[name], flat[name]) for name in nested)
    for i, text in enumerate(texts):
        alone = processor.tokenizer(text)["input_ids"]
        pad = nested["input_ids"].size(1) - len(alone)
        assert alone[0] == BOS and BOS not in alone[1:]
        assert nested["input_ids"][i].tolist() == [PAD] * pad + alone
        assert nested["attention_mask"][i].tolist() == [0] * pad + [1] * len(alone)
    pixels = nested["pixel_values"]
    assert pixels.shape == (3, 2, 3, SIZE, SIZE)
    assert not pixels[1].any() and not pixels[2, 1].any()
    assert torch.equal(pixels[0, 1], processor.image_processor(second)["pixel_values"][0])
    assert torch.equal(pixels[2, 0], processor.image_processor(third)["pixel_values"][0])


def test_text_alone_has_no_pixel_values_and_training_pads_on_the_right(processor: Any) -> None:
    inputs = processor(text=["a", "a longer text"], padding_side="right")
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert inputs["attention_mask"][0, 0] == 1 and inputs["attention_mask"][0, -1] == 0


@pytest.mark.parametrize(
    ("text", "images", "problem"),
    [
        ("<image>a", None, "text 0 has 1 <image> tokens and 0 images: write <image> once for each image"),
        ("a", [1], "text 0 has 0 <image> tokens and 1 images"),
        (["<image>a", "<image><image>b"], [[1], [1]], "text 1 has 2 <image> tokens and 1 images"),
        (["<image>a", "<image>b"], [1], "the 2 texts have 2 <image> tokens and there are 1 images"),
        (["<image>a", "<image>b"], [[1]], "2 texts and 1 lists of images: pass one list for each text"),
        (None, [1], "text is missing"),
    ],
)
def test_tags_and_pictures_that_disagree_are_refused(processor: Any, text: Any, images: Any, problem: str) -> None:
    pictures = [noise(8, 8) if one == 1 else [noise(8, 8)] * len(one) for one in images] if images else None
    with pytest.raises(ValueError, match=problem):
        processor(text=text, images=pictures)


def test_truncation_may_not_cut_a_picture_off(processor: Any) -> None:
    text = "<image>a text that is too long <image>b"
    with pytest.raises(ValueError, match="text 0 has 2 <image> tokens, and truncation left 1 of them: allow a larger"):
        processor(text=text, images=[noise(8, 8)] * 2, truncation=True, max_length=6)


def test_what_it_does_not_make_is_refused(processor: Any) -> None:
    with pytest.raises(ValueError, match="return_tensors = 'np': only 'pt' is made here"):
        processor(text="a", return_tensors="np")
    with pytest.raises(ValueError, match="leave out videos and audio"):
        processor(text="a", videos=[1])


def test_it_survives_a_round_trip(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    inputs = {"text": "<image>a", "images": noise(80, 60)}
    before, after = processor(**inputs), again(**inputs)
    assert again.chat_template == processor.chat_template
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- chat -----------------------------------------------------------------------------------------------------------

PART = {"type": "image"}
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


CONVERSATIONS = {
    "no system": [user(PART, "What is it?")],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    "several turns": [
        user(PART, "What is it?"),
        {"role": "assistant", "content": "A cat."},
        user("And", PART, PART, "these?"),
        {"role": "assistant", "content": [{"type": "text", "text": "Dogs."}]},
        user("Sure?"),
    ],
}
ZEPHYR_EXPECTED = {
    "no system": "<|system|>\n</s>\n<|user|>\n<|endofchunk|><image>What is it?</s>\n",
    "system": "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n",
    "several turns": (
        "<|system|>\n</s>\n<|user|>\n<|endofchunk|><image>What is it?</s>\n<|assistant|>\nA cat.</s>\n"
        "<|user|>\nAnd<|endofchunk|><image><|endofchunk|><image>these?</s>\n<|assistant|>\nDogs.</s>\n"
        "<|user|>\nSure?</s>\n"
    ),
}
VICUNA_EXPECTED = {
    "no system": VICUNA + "USER: <|endofchunk|><image>What is it? ",
    "system": "Be brief. USER: Hi ",
    "several turns": (
        VICUNA + "USER: <|endofchunk|><image>What is it? ASSISTANT: A cat.</s>"
        "USER: And<|endofchunk|><image><|endofchunk|><image>these? ASSISTANT: Dogs.</s>USER: Sure? "
    ),
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(
    ("kind", "expected", "answer"),
    [
        ("infimm-zephyr", ZEPHYR_EXPECTED, "<|assistant|>\n"),
        ("infimm-vicuna", VICUNA_EXPECTED, "ASSISTANT:"),
        ("infimm-llama", VICUNA_EXPECTED, "ASSISTANT:"),
    ],
)
def test_chat_formats(
    folders: dict[str, Path], kind: str, expected: dict[str, str], answer: str, conversation: str
) -> None:
    messages, text = CONVERSATIONS[conversation], expected[conversation]
    one = AutoProcessor.from_pretrained(folders[kind], trust_remote_code=True)
    assert one.apply_chat_template(messages) == text
    assert one.apply_chat_template(messages, add_generation_prompt=True) == text + answer
    tokenizer = AutoTokenizer.from_pretrained(folders[kind], trust_remote_code=True)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text


@pytest.mark.parametrize("kind", ["infimm-zephyr", "infimm-vicuna"])
@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "tool", "content": "x"}, "a message of role tool: use system"),
        ({"role": "user", "content": [{"type": "video"}]}, "a part of type video: use text or image"),
    ],
)
def test_chats_of_another_kind_are_refused(
    folders: dict[str, Path], kind: str, message: dict[str, Any], problem: str
) -> None:
    one = AutoProcessor.from_pretrained(folders[kind], trust_remote_code=True)
    with pytest.raises(Exception, match=problem):
        one.apply_chat_template([message])


def test_a_chat_becomes_the_models_inputs(processor: Any) -> None:
    pictures = [noise(80, 60, seed=seed) for seed in range(2)]
    messages = [
        user({"type": "image", "image": pictures[0]}, "What is it?"),
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        user({"type": "image", "image": pictures[1]}, "And this?"),
    ]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    same = processor(text=text, images=pictures)
    assert all(torch.equal(inputs[name], same[name]) for name in same)
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(BOS) == 1 and ids.count(IMAGE) == ids.count(EOC) == 2
    assert processor.batch_decode(inputs["input_ids"]) == ["<s> " + text]
