"""What a toy run needs, made where it is absent: the toy world's data sets and a tokenizer."""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Pieces
from transformers import PreTrainedTokenizerFast

from megavlm.data.chat import END_OF_CHUNK, MESSAGE_END, MESSAGE_START, ChatConfig
from megavlm.data.formats import Words
from megavlm.data.shards import write_shards
from megavlm.data.token_counts import add_token_counts
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.toy_world.samples import toy_samples
from megavlm.data.toy_world.world import SampleKind

SAMPLES: dict[SampleKind, int] = {"pairs": 600, "documents": 150, "chat": 1200, "multi_image": 150, "text": 150}
_TAGS = {"infimm": {END_OF_CHUNK: 261, "<image>": 262}, "aquila-vl": {"<image>": 510, "<video>": 511}}
_CHATS = {
    "infimm": (ChatConfig(template="plain"), ChatConfig(template="vicuna")),
    "aquila-vl": (ChatConfig(template="plain", caption_end="\n"), ChatConfig(template="chatml")),
}


def make_toys(family: str, folder: Path, data_path: str | None, is_first: bool) -> list[str]:
    """The options that name them; only the first process makes what is absent."""
    data = Path(data_path) if data_path else folder / "data"
    if is_first:
        if not (folder / "tokenizer").is_dir():
            _write_tokenizer(folder / "tokenizer", _TAGS[family])
        read = Tokenizer(folder / "tokenizer")
        captions, conversations = _CHATS[family]
        for kind, count in SAMPLES.items():
            if not (data / f"toy-{kind}").is_dir():
                words = Words(read, captions if kind in ("pairs", "documents") else conversations)
                write_shards([list(toy_samples(kind, "train", 0, count))], data / f"toy-{kind}")
                add_token_counts(data / f"toy-{kind}", words.count, words.name, words.hash)
    return ["--data-path", str(data), "--tokenizer", str(folder / "tokenizer")]


def _write_tokenizer(folder: Path, tags: dict[str, int]) -> None:
    special = ["<unk>", "<s>", "</s>", MESSAGE_START, MESSAGE_END]
    letters = [letter for letter in string.printable if letter.isprintable() or letter == "\n"]
    words = {word: number for number, word in enumerate([*special, *letters])} | tags
    tokenizer = Pieces(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in (*special, *tags)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
