"""Hugging Face folders for tests: the tokenizer that goes with the tiny InfiMM fixture."""

from __future__ import annotations

import shutil
import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|endofchunk|>": 126}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}:"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|endofchunk|><image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE, image_token_id: int = 127) -> None:
    """One token a printable ASCII character, and `SPECIAL` and the tag: the 128 of the fixture's model."""
    tokens = {**SPECIAL, "<image>": image_token_id}
    letters = [character for character in string.printable if character.isprintable()]
    free = (number for number in range(128) if number not in tokens.values())
    words = {**tokens, **dict(zip(letters, free, strict=False))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|endofchunk|>", "<image>"],
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def infimm_folder(fixture: Path, target: Path) -> Path:
    """A copy of the fixture's model with a tokenizer."""
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(fixture / name, target)
    write_tokenizer(target)
    return target
