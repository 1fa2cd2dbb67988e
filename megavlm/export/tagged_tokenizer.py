"""The tokenizer of an Aquila-VL folder: a decoder's own, with `<image>` and `<video>` added where it lacks them.

Its files are edited, not written anew, so that every version of transformers goes on reading them.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megavlm.errors import WeightsError
from megavlm.log import get_logger

logger = get_logger(__name__)

TAGS = ("<image>", "<video>")
_TOKENIZER, _CONFIG, _SPECIAL, _ADDED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_OTHERS = ("tokenizer.model", "vocab.json", "merges.txt")
_REMEDY = "copy the files of the model's tokenizer again"


@dataclass(frozen=True)
class TaggedTokenizer:
    """A tokenizer's files, and the tokens of the tags in it."""

    files: dict[str, bytes]
    image: int
    video: int

    @property
    def tokens(self) -> tuple[int, int]:
        """Those of `<image>` and `<video>`."""
        return self.image, self.video


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((Path(folder) / name).is_file() for name in (_TOKENIZER, *_OTHERS))


def tagged_tokenizer(folder: str | Path) -> TaggedTokenizer:
    """The tokenizer of a folder; tags that it lacks get the next free numbers."""
    found = {
        name: (Path(folder) / name).read_bytes()
        for name in (_TOKENIZER, _CONFIG, _SPECIAL, _ADDED, *_OTHERS)
        if (Path(folder) / name).is_file()
    }
    if not has_tokenizer(folder):
        problem = f"the folder holds none of {', '.join((_TOKENIZER, *_OTHERS))}"
        raise WeightsError("tokenizer of", str(folder), problem, "copy the files of the model's tokenizer into it")
    if _TOKENIZER not in found:
        found[_TOKENIZER] = _loaded(folder, str(folder)).backend_tokenizer.to_str().encode()
    content = {name: _parsed(raw, f"{folder}/{name}") for name, raw in found.items() if name.endswith(".json")}
    content[_CONFIG] = _for_all_versions(content.get(_CONFIG, {}))
    held = _numbers(content[_TOKENIZER], f"{folder}/{_TOKENIZER}")
    tokens = {}
    for tag in TAGS:
        tokens[tag] = held[tag] if tag in held else _add(tag, content, held)
        logger.info("%s is token %d%s", tag, tokens[tag], "" if tag in held else ", added to the tokenizer")
    changed = {name: (json.dumps(part, ensure_ascii=False, indent=2) + "\n").encode() for name, part in content.items()}
    files = {**found, **(changed if any(tag not in held for tag in TAGS) else {_CONFIG: changed[_CONFIG]})}
    _check(files, tokens, str(folder))
    return TaggedTokenizer(files, *tokens.values())


def _for_all_versions(config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json in words that transformers 4 reads as well as 5, which has new ones for the same."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _numbers(tokenizer: dict[str, Any], where: str) -> dict[str, int]:
    """Each token's number."""
    try:
        words = tokenizer["model"]["vocab"]
        held = dict(words) if isinstance(words, dict) else {piece: at for at, (piece, _) in enumerate(words)}
        held |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    except (KeyError, TypeError, ValueError):
        held = {}
    if not held or any(type(number) is not int for number in held.values()):
        raise WeightsError("tokens of", where, "are not where they should be", _REMEDY)
    return held


def _add(tag: str, content: dict[str, dict[str, Any]], held: dict[str, int]) -> int:
    """Add a special token to every file that lists such; its number is the next free one."""
    added = content[_TOKENIZER]["added_tokens"]
    number = max([*held.values(), *(token["id"] for token in added)], default=-1) + 1
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added.append({"id": number, "content": tag, **plain, "special": True})
    config = content[_CONFIG]
    if isinstance(config.get("added_tokens_decoder"), dict):
        config["added_tokens_decoder"][str(number)] = {"content": tag, **plain, "special": True}
    for part in (config, content.get(_SPECIAL, {})):
        if isinstance(part.get("additional_special_tokens"), list):
            part["additional_special_tokens"].append(tag)
    if _ADDED in content:
        content[_ADDED][tag] = number
    return number


def _check(files: dict[str, bytes], tokens: dict[str, int], where: str) -> None:
    """Whether transformers reads these files, and gives the tags these numbers."""
    with tempfile.TemporaryDirectory() as place:
        for name, raw in files.items():
            (Path(place) / name).write_bytes(raw)
        loaded = _loaded(place, where)
    for tag, number in tokens.items():
        if loaded.convert_tokens_to_ids(tag) != number:
            problem = f"transformers makes it {loaded.convert_tokens_to_ids(tag)}: the vocabulary has gaps"
            raise WeightsError(f"token of {tag} in {where}", number, problem, f"add {tag} to the tokenizer by hand")


def _loaded(folder: str | Path, where: str) -> Any:
    try:
        # Never code from the folder.
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError("tokenizer of", where, f"cannot be read: {reason}", _REMEDY) from error


def _parsed(raw: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"content of {where}", str(error), "is not JSON", _REMEDY) from error
    if not isinstance(content, dict):
        raise WeightsError(f"content of {where}", content, "should be a JSON object", _REMEDY)
    return content
