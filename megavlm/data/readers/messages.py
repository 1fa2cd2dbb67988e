"""OpenAI's messages as jsonl: `messages` of role and content, pictures as parts (file names or data URLs) or beside."""

from megavlm.data.readers.base import Reader
from megavlm.data.readers.conversation import conversation
from megavlm.data.readers.json_files import JSON

MESSAGES = Reader("OpenAI messages as jsonl: role and content, text and image_url parts", JSON, conversation)
