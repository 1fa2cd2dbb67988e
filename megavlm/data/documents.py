"""Documents to tokens and targets: captions behind their pictures, and texts with pictures between.

As OpenFlamingo has them, whose form InfiMM follows: blanks around a picture are dropped, `<|endofchunk|>` goes before
each picture but the first, and at the end it and the end of a text. Nothing is trained before the first picture; a tag
never is. Where the tokenizer has no `<|endofchunk|>`, the end of a text alone closes the document.
"""

from __future__ import annotations

import re

import numpy as np

from megavlm.batch import IGNORED
from megavlm.data.chat import END_OF_CHUNK, Encoded
from megavlm.data.sample import IMAGE_TAG, VIDEO_TAG
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import DataError

_TAG_AND_BLANKS = re.compile(rf"\s*({re.escape(IMAGE_TAG)}|{re.escape(VIDEO_TAG)})\s*")


def encode_document(text: str, tokenizer: Tokenizer, where: str = "document") -> Encoded:
    """A document as tokens, one for each tag."""
    chunk = "" if tokenizer.token_of(END_OF_CHUNK) is None else END_OF_CHUNK
    written = _TAG_AND_BLANKS.sub(lambda found: chunk + found[1], text.strip())
    written = written.replace(chunk, "", 1) if chunk and _TAG_AND_BLANKS.search(written) else written
    tokens, _ = tokenizer.encode_with_spans(written + chunk + tokenizer.end, surround=True)
    tags = [token for tag in (IMAGE_TAG, VIDEO_TAG) if (token := tokenizer.token_of(tag)) is not None]
    is_tag = np.isin(tokens, tags)
    if int(is_tag.sum()) != len(_TAG_AND_BLANKS.findall(text)):
        problem = f"has no token for each tag in {tokenizer.folder}"
        raise DataError(where, int(is_tag.sum()), problem, f"add {IMAGE_TAG} to its special tokens")
    is_trained = ~is_tag & ((is_tag.cumsum() > 0) if is_tag.any() else np.ones(len(tokens), bool))
    return Encoded(tokens, np.where(is_trained, tokens, IGNORED))
