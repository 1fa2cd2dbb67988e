"""Conversations to tokens and targets, written out: what is trained in each format, tags, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import qwen_hf
import tiny_folders

from megavlm.batch import IGNORED
from megavlm.data.chat import ChatConfig, Encoded, encode_chat, encode_chatml
from megavlm.data.sample import Turn
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import ConfigError, DataError, WeightsError

SYSTEM = "system\nYou are a helpful assistant."
Said = tuple[str, ...]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(qwen_hf.write_tokenizer(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """InfiMM's special tokens, and one token a letter."""
    folder = tmp_path_factory.mktemp("letters")
    tiny_folders.write_tokenizer(folder)
    return Tokenizer(folder)


def turns(*texts: str) -> list[Turn]:
    """User and assistant in turn."""
    return [Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]


def marked(encoded: Encoded, tokenizer: Tokenizer) -> str:
    """The text of the tokens, with « and » around what is trained."""
    is_trained = encoded.targets != IGNORED
    assert np.array_equal(encoded.targets[is_trained], encoded.tokens[is_trained])
    cuts = np.flatnonzero(np.diff(is_trained)) + 1
    runs = zip(np.split(encoded.tokens, cuts), np.split(is_trained, cuts), strict=True)
    texts = [(tokenizer._tokenizer.decode(run.tolist()), trained[0]) for run, trained in runs]
    return "".join(f"«{text}»" if trained else text for text, trained in texts)


# --- chatml ---------------------------------------------------------------------------------------------------------


def test_the_clean_mask(qwen: Tokenizer) -> None:
    said = turns("What is\nin it?", "A.\n\nB", "And?", "Two")
    assert marked(encode_chatml(said, qwen, "clean"), qwen) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhat is\nin it?<|im_end|>\n"
        "<|im_start|>assistant\n«A.\n\nB<|im_end|>»\n"
        "<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n«Two<|im_end|>»\n"
    )


def test_the_released_mask(qwen: Tokenizer) -> None:
    """Newlines by themselves and the marks of messages everywhere; of the assistant all; `.\\n` and `\\n\\n` are other
    tokens than a newline."""
    said = turns("<image>\nWhat is\nin it\n\nNo.\nhi", "A.\nB", "And?", "Two")
    assert marked(encode_chatml(said, qwen, "released"), qwen) == (
        "«<|im_start|>»system«\n»You are a helpful assistant.«<|im_end|>\n"
        "<|im_start|>»user«\n»<image>«\n»What is«\n»in it\n\nNo.\nhi«<|im_end|>\n"
        "<|im_start|>assistant\nA.\nB<|im_end|>\n"
        "<|im_start|>»user«\n»And?«<|im_end|>\n"
        "<|im_start|>assistant\nTwo<|im_end|>\n»"
    )


def test_the_released_mask_as_ids(qwen: Tokenizer) -> None:
    """For one question and answer, of letters that the tokenizer knows alone."""
    start, end, user, newline = (qwen.token_of(word) for word in ("<|im_start|>", "<|im_end|>", "Q", "Ċ"))
    made = encode_chatml(turns("Q", "Z"), qwen, "released", system="Y")
    role = {name: qwen.encode(name) for name in ("system", "user", "assistant")}
    y, z = qwen.token_of("Y"), qwen.token_of("Z")
    no = IGNORED
    expected_tokens = [start, *role["system"], newline, y, end, newline, start, *role["user"], newline, user, end]
    expected_tokens += [newline, start, *role["assistant"], newline, z, end, newline]
    expected = [start, *[no] * len(role["system"]), newline, no, end, newline]
    expected += [start, *[no] * len(role["user"]), newline, no, end, newline]
    expected += [start, *role["assistant"], newline, z, end, newline]
    assert made.tokens.tolist() == expected_tokens and made.targets.tolist() == expected


def test_an_answer_that_melts_into_its_header_is_trained_from_the_next_token_on(qwen: Tokenizer) -> None:
    assert marked(encode_chatml(turns("a", "\nB"), qwen, "clean"), qwen).endswith(
        "<|im_start|>assistant\n\n«B<|im_end|>»\n"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("<image>What?", "<image>What?"),
        ("What?\n<image>", "<image>\nWhat?"),
        ("  What <image> now?  ", "<image>\nWhat  now?"),
        (" <image>", "<image>"),
        ("What?<video>", "<video>\nWhat?"),
        ("left <image> or <image> right? ", "left <image> or <image> right? "),
        ("a <image> and <video>", "a <image> and <video>"),
        ("no tag ", "no tag "),
    ],
)
def test_a_single_tag_comes_first(qwen: Tokenizer, text: str, expected: str) -> None:
    found = marked(encode_chatml(turns(text, "B"), qwen, "clean"), qwen)
    assert f"<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\n«B" in found


def test_tags_are_one_token_and_never_trained(qwen: Tokenizer) -> None:
    for mask in ("clean", "released"):
        made = encode_chat(turns("<image><image>", "a <image> b <video>"), qwen, ChatConfig(mask=mask))
        tags = [int(qwen.token_of(tag) or -1) for tag in ("<image>", "<video>")]
        assert [int((made.tokens == tag).sum()) for tag in tags] == [3, 1]
        assert (made.targets[np.isin(made.tokens, tags)] == IGNORED).all()


def test_first_turns(qwen: Tokenizer) -> None:
    question = turns("Q", "Z")
    plain = encode_chatml(question, qwen, "clean")
    dropped = encode_chatml([Turn("assistant", "Hello"), *question], qwen, "clean")
    assert dropped.tokens.tolist() == plain.tokens.tolist()
    own = encode_chatml([Turn("system", "S"), *question], qwen, "clean")
    assert marked(own, qwen).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ")
    assert own.tokens.tolist() == encode_chat(question, qwen, ChatConfig(system="S")).tokens.tolist()


def test_an_open_answer_ends_where_it_begins(qwen: Tokenizer) -> None:
    whole = encode_chatml(turns("Q", "Z"), qwen, "clean").tokens.tolist()
    asked = encode_chatml(turns("Q"), qwen, "clean", open_answer=True).tokens.tolist()
    assert whole[: len(asked)] == asked and whole[len(asked)] == qwen.token_of("Z")


# --- InfiMM's -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "zephyr",
            "<s><|system|><unk></s><unk><|user|><unk><|endofchunk|><image>What?</s><unk>"
            "<|assistant|><unk>«Two.</s>»<unk><|user|><unk>Why?</s><unk><|assistant|><unk>«So.</s>»<unk>",
        ),
        (
            "vicuna",
            "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: <|endofchunk|><image>What? ASSISTANT:"
            "« Two.</s>»USER: Why? ASSISTANT:« So.</s>»",
        ),
    ],
)
def test_infimms_chats(letters: Tokenizer, template: str, expected: str) -> None:
    config = ChatConfig.from_dict({"template": template})
    said = turns("What?\n<image>", "Two.", "Why?", "So.")
    # This tokenizer has no newline.
    assert marked(encode_chat(said, letters, config), letters).replace("\n", "") == expected
    own = marked(encode_chat([Turn("system", "Be brief."), *said], letters, config), letters)
    assert "Be brief." in own and "A chat" not in own and "<|system|><unk></s>" not in own


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (turns("<image>\nDescribe it.", " A red square.\n"), "<s><image>«A red square.<|endofchunk|></s>»"),
        (turns("Both? <image> <image>", "Two."), "<s><image><image>«Two.<|endofchunk|></s>»"),
        (turns("Say it.", "Two."), "<s>«Two.<|endofchunk|></s>»"),
    ],
)
def test_captions(letters: Tokenizer, said: list[Turn], expected: str) -> None:
    assert marked(encode_chat(said, letters, ChatConfig(template="plain")), letters) == expected
    asked = encode_chat(said[:1], letters, ChatConfig(template="plain"), open_answer=True)
    assert marked(asked, letters) == expected.partition("«")[0]


def test_captions_of_llava(qwen: Tokenizer) -> None:
    said = turns("<image>", "A dog.")
    found = encode_chat(said, qwen, ChatConfig(template="plain", caption_end="\n"))
    assert marked(found, qwen) == "<image>«A dog.\n»"
    assert marked(encode_chat(said, qwen, ChatConfig(template="plain")), qwen) == "<image>«A dog.<|im_end|>»"


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_conversations_that_are_refused(qwen: Tokenizer, letters: Tokenizer) -> None:
    def refuse(said: list[Turn], problem: str, tokenizer: Tokenizer = qwen, **config: str) -> None:
        with pytest.raises(DataError, match=problem):
            encode_chat(said, tokenizer, ChatConfig.from_dict(config), "sample 5")

    nobody = Turn("gpt", "a")  # type: ignore[arg-type]
    refuse([], "sample 5: turns = 0: hold no question")
    refuse([Turn("assistant", "a")], "hold no question")
    refuse([Turn("system", "a")], "hold no question")
    refuse([nobody], "sample 5: role of turn 0 = 'gpt'.*use one of system, user, assistant")
    refuse([*turns("a"), Turn("system", "b")], "sample 5: turn 1 = 'b': is a system message behind another turn")
    refuse(turns("a", "b", "c", "d"), r"sample 5: answers = \['b', 'd'\].*use another template", template="plain")
    refuse(turns("<video>", "b"), "sample 5 = .*InfiMM does not read", letters, template="zephyr")


def test_tokenizers_that_do_not_fit(letters: Tokenizer, tmp_path: Path) -> None:
    bare = qwen_hf.write_tokenizer(tmp_path / "bare", media_tokens=False)
    with pytest.raises(WeightsError, match="has no token for <image>"):
        encode_chatml(turns("<image>", "a"), Tokenizer(bare), "clean")
    with pytest.raises(WeightsError, match=r"has no single token for '<\|im_start\|>'"):
        encode_chatml(turns("a", "b"), letters, "released")
    helped = Tokenizer(bare, added_tokens=("<image>", "<video>"))
    used = qwen_hf.tiny_tokenizer(media_tokens=False)
    assert (helped.token_of("<image>"), helped.token_of("<video>")) == (len(used), len(used) + 1)
    assert (encode_chatml(turns("<image>", "a"), helped, "clean").tokens == len(used)).sum() == 1
    had = Tokenizer(qwen_hf.write_tokenizer(tmp_path / "had"), added_tokens=("<image>",))
    assert had.token_of("<image>") == qwen_hf.tiny_tokenizer().convert_tokens_to_ids("<image>")


def test_tokenizers_that_lack_what_a_format_needs(tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "vocab.json").write_text('{"<unk>": 0, "a</w>": 1}')
    (slow / "merges.txt").write_text("#version: 0.2\n")
    (slow / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
    with pytest.raises(WeightsError, match=r"cannot tell where its tokens lie.*add its tokenizer.json"):
        encode_chatml(turns("a", "a"), Tokenizer(slow), "clean")
    with pytest.raises(WeightsError, match="has no token that ends a text; set eos_token"):
        encode_chat(turns("a", "a"), Tokenizer(slow), ChatConfig(template="zephyr"))


def test_settings_of_another_template_are_refused() -> None:
    with pytest.raises(ConfigError, match="caption_end"):
        ChatConfig(caption_end="\n")
    with pytest.raises(ConfigError, match="system"):
        ChatConfig(template="plain", system="S")
