"""What an Aquila-VL folder carries beside weights: processor, chat format, settings of generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from qwen_hf import tiny_tokenizer, write_tokenizer

from megavlm.errors import ConfigError
from megavlm.export.aquila_vl_folder import CHAT_TEMPLATE, Layout, aquila_vl_family_files
from megavlm.export.tagged_tokenizer import tagged_tokenizer
from megavlm.model.aquila_vl.config import AquilaVLConfig
from megavlm.model.decoder.config import DecoderConfig
from megavlm.tiles import STAGE_GRIDS

DECODER = DecoderConfig(
    family="qwen2",
    num_layers=1,
    hidden_size=8,
    ffn_hidden_size=8,
    num_attention_heads=1,
    num_query_groups=1,
    kv_channels=8,
    vocab_size=400,
    add_qkv_bias=True,
    bos_token_id=3,
    eos_token_ids=(4, 5),
)
FREE = len(tiny_tokenizer(media_tokens=False))
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def files_of(stage: str = "2b", layout: Layout = "transformers", source: Path | None = None) -> dict[str, Any]:
    """The files, those of JSON read."""
    parts = AquilaVLConfig(grid=STAGE_GRIDS[stage], image_token_id=FREE, video_token_id=FREE + 1)
    tokenizer = None if source is None else tagged_tokenizer(source)
    made = aquila_vl_family_files(DECODER, parts, "bfloat16", layout, tokenizer, source)
    return {name: json.loads(raw) if name.endswith(".json") else raw.decode() for name, raw in made.items()}


def test_processor_of_the_published_tower() -> None:
    made = files_of()
    processor, images = made["processor_config.json"], made["preprocessor_config.json"]
    assert processor["num_image_tokens"] == 729 and processor["vision_feature_select_strategy"] == "full"
    assert processor["vision_aspect_ratio"] == made["config.json"]["vision_aspect_ratio"] == "anyres_max_5"
    assert images["image_grid_pinpoints"] == made["config.json"]["image_grid_pinpoints"]
    for pixels in (images, made["video_preprocessor_config.json"]):
        assert pixels["size"] == {"height": 384, "width": 384}
        assert pixels["image_mean"] == pixels["image_std"] == [0.5, 0.5, 0.5]


def test_a_chat_format_wherever_versions_look_for_it(tmp_path: Path) -> None:
    made = files_of(source=write_tokenizer(tmp_path, media_tokens=False))
    places = ("chat_template.json", "tokenizer_config.json")
    assert {made["chat_template.jinja"], *(made[name]["chat_template"] for name in places)} == {CHAT_TEMPLATE}


def test_llava_nexts_layout_has_no_processor(tmp_path: Path) -> None:
    made = files_of(layout="llava-next", source=write_tokenizer(tmp_path, media_tokens=False))
    assert made["config.json"]["model_type"] == "llava_qwen"
    assert sorted(made) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    parts = AquilaVLConfig(image_token_id=151665, video_token_id=151666)
    tokenizer = tagged_tokenizer(write_tokenizer(tmp_path))
    with pytest.raises(ConfigError, match=f"token of <image> = 151665: the tokenizer says {FREE}; use the"):
        aquila_vl_family_files(DECODER, parts, "bfloat16", "transformers", tokenizer, tmp_path)


def test_settings_of_generation_go_along_or_name_the_ends(tmp_path: Path) -> None:
    assert files_of()["generation_config.json"] == {"bos_token_id": 3, "eos_token_id": [4, 5]}
    source = write_tokenizer(tmp_path, media_tokens=False)
    (source / "generation_config.json").write_text('{"eos_token_id": [7], "do_sample": true}')
    assert files_of(source=source)["generation_config.json"] == {"eos_token_id": [7], "do_sample": True}


def test_single_tiles_are_warned_of_where_transformers_sees_more(caplog: pytest.LogCaptureFixture) -> None:
    files_of("1", "llava-next")
    files_of("2a")
    assert not caplog.records
    assert files_of("1")["config.json"]["image_grid_pinpoints"] == [[384, 384]]
    (record,) = caplog.records
    assert "single tiles of 729 tokens" in record.getMessage() and "1485 tokens" in record.getMessage()


IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([("user", "hi ")], SYSTEM + "<|im_start|>user\nhi <|im_end|>\n"),
        (
            [("system", "Be brief."), ("user", "hi")],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_",
        ),
        ([("user", ["What ", IMAGE, "is it?"])], SYSTEM + "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"),
        (
            [("user", [VIDEO, IMAGE, " a", IMAGE])],
            SYSTEM + "<|im_start|>user\n<image>\n<image>\n<video>\na<|im_end|>\n",
        ),
        ([("user", [IMAGE])], SYSTEM + "<|im_start|>user\n<image><|im_end|>\n"),
        (
            [("user", "a"), ("assistant", "b"), ("user", ["c"])],
            SYSTEM
            + "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n",
        ),
    ],
)
def test_chat_format(messages: list[tuple[str, Any]], expected: str) -> None:
    tokenizer = tiny_tokenizer()
    turns = [
        {
            "role": role,
            "content": text
            if isinstance(text, str)
            else [{"type": "text", "text": part} if isinstance(part, str) else part for part in text],
        }
        for role, text in messages
    ]
    said = tokenizer.apply_chat_template(turns, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True)
    assert said.startswith(expected) and said.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert said.count("<|im_start|>") == expected.count("<|im_start|>") + 1


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "tool", "content": "x"}, "a message of role tool: use system, user or assistant"),
        ({"role": "user", "content": [{"type": "audio"}]}, "a part of type audio: use text, image or video"),
    ],
)
def test_what_the_chat_format_cannot_say(message: dict[str, Any], problem: str) -> None:
    with pytest.raises(Exception, match=problem):
        tiny_tokenizer().apply_chat_template([message], chat_template=CHAT_TEMPLATE, tokenize=False)
