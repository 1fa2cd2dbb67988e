"""LLaVA's json or jsonl: `conversations` with `<image>` tags, `image` and `video` named beside them."""

from megavlm.data.readers.base import Reader
from megavlm.data.readers.conversation import conversation
from megavlm.data.readers.json_files import JSON

LLAVA = Reader("LLaVA json or jsonl: conversations (from, value), image, video", JSON, conversation)
