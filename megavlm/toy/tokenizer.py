"""The toy world's tokenizer: whole words, single capitals and digits, each with and without a blank before it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Pieces
from transformers import PreTrainedTokenizerFast

from megavlm.data.chat import CHATML_SYSTEM, END_OF_CHUNK, MESSAGE_END, MESSAGE_START, VICUNA_SYSTEM
from megavlm.data.sample import IMAGE_TAG, VIDEO_TAG
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.toy_world.vocabulary import vocabulary

UNKNOWN, START, END = "<unk>", "<s>", "</s>"
NEW_TOKENS = (END_OF_CHUNK, IMAGE_TAG)
"""What InfiMM adds to its decoder's vocabulary, behind all else."""
_SPECIAL = (UNKNOWN, START, END, MESSAGE_START, MESSAGE_END, VIDEO_TAG)
_PHRASES = (VICUNA_SYSTEM, CHATML_SYSTEM, "USER:", "ASSISTANT:")
"""Of the chat formats, each one token: toy rows are short, and a toy decoder has nothing to learn from them."""
_ROLES = ("system", "user", "assistant")
_PIECE = r"\n| ?[A-Z]?[a-z]+| ?[^a-z\s]|\s"


def words() -> list[str]:
    """The tokens of the decoder, in the order of their numbers."""
    plain = [" ", "\n", *_ROLES, *vocabulary()]
    return [*_SPECIAL, *_PHRASES, *plain, *(f" {word}" for word in vocabulary())]


def toy_tokenizer(*, of_chatml: bool = False) -> PreTrainedTokenizerFast:
    """Splits text so that joining its tokens gives it back, but for blanks around the words of the chat formats.

    `of_chatml`: as Qwen2.5's does, it lets no text begin with a token of its own, and messages are what ends.
    """
    known = words()
    tokenizer = Pieces(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in (*_SPECIAL, *NEW_TOKENS)])
    tokenizer.add_tokens([AddedToken(word, lstrip=True, normalized=False) for word in _PHRASES])
    if not of_chatml:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, known.index(START))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=MESSAGE_END if of_chatml else END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def write_tokenizer(folder: Path, *, of_chatml: bool = False) -> None:
    """Its files."""
    toy_tokenizer(of_chatml=of_chatml).save_pretrained(folder)


def toy_words() -> Tokenizer:
    """It, read as any folder's is."""
    with tempfile.TemporaryDirectory() as place:
        write_tokenizer(Path(place))
        return Tokenizer(place)
