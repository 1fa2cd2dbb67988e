"""`megavlm generate`, from its command line to its answer, and its mistakes."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from infimm_hf import golden_folder, load, offline
from PIL import Image
from tiny_folders import infimm_folder, write_tokenizer
from transformers import AutoProcessor

from megavlm.cli import main
from megavlm.data.images import clip_pixels, open_image
from megavlm.testing import spawn

GOLDEN = Path(__file__).parents[1] / "fixtures" / "infimm_zephyr_tiny"
Outcome = tuple[int, str, str]


def run_commands(commands: list[list[str]]) -> list[Outcome]:
    """(exit code, standard output, standard error) of each command, one after another, on one rank."""
    outcomes = []
    for command in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["generate", *command])
        outcomes.append((code, out.getvalue(), err.getvalue()))
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return infimm_folder(GOLDEN, tmp_path_factory.mktemp("infimm") / "hf")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two pictures, neither of the tower's size."""
    draw = np.random.default_rng(0)
    paths = [tmp_path_factory.mktemp("images") / name for name in ("wide.png", "tall.jpg")]
    for path, shape in zip(paths, ((70, 90, 3), (80, 64, 3)), strict=True):
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


def one(command: list[str]) -> Outcome:
    ((outcome,),) = spawn(run_commands, 1, [command])
    return outcome


# --- answers --------------------------------------------------------------------------------------------------------


def test_answers(folder: Path, images: list[str]) -> None:
    prompt = ["--hf", str(folder), "--prompt", "a <image> and <image>: ", "--image", *images, "--max-new-tokens", "12"]
    alone = spawn(run_commands, 1, [[*prompt, "--json"], prompt, [*prompt, "--chat", "--json"]])[0]
    assert [(code, err) for code, _, err in alone] == [(0, "")] * 3
    answer = json.loads(alone[0][1])
    assert answer["prompt_token_ids"].count(127) == 2
    assert answer["prompt_token_ids"][0] == 1 and 1 not in answer["prompt_token_ids"][1:]
    assert 1 <= len(answer["token_ids"]) <= 12
    assert alone[1][1] == answer["text"] + "\n"

    chat = json.loads(alone[2][1])["prompt_token_ids"]
    assert chat.count(1) == 1, "one beginning"
    tags = [place for place, token in enumerate(chat) if token == 127]
    assert len(tags) == 2 and all(chat[place - 1] == 126 for place in tags), "the chat format closes before each image"

    two = spawn(run_commands, 2, [[*prompt, "--json", "--tensor-model-parallel-size", "2", "--sequence-parallel"]])
    assert [code for ((code, _, _),) in two] == [0, 0]
    assert sorted(out for ((_, out, _),) in two) == ["", alone[0][1]], "one rank prints, and says the same"


def test_transformers_says_the_same_of_an_exported_folder(images: list[str], tmp_path: Path) -> None:
    """Chat format, tokens, pixels and greedy text, by the folder's own code and by ours."""
    folder = golden_folder(tmp_path / "hf")
    question = "left <image> or right <image>?"
    parts = [{"type": "text", "text": "left "}, {"type": "image"}, {"type": "text", "text": " or right "}]
    parts += [{"type": "image"}, {"type": "text", "text": "?"}]
    with offline(tmp_path / "code"):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        inputs = processor(text=text, images=[Image.open(image) for image in images])
        made = load(folder).generate(**inputs, max_new_tokens=12, do_sample=False)[0].tolist()
    for image, theirs in zip(images, inputs["pixel_values"][0], strict=True):
        assert torch.equal(clip_pixels(open_image(image), theirs.size(-1)), theirs)
    length = inputs["input_ids"].size(1)
    code, out, err = one(
        ["--hf", str(folder), "--prompt", question, "--image", *images, "--chat", "--max-new-tokens", "12", "--json"]
    )
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["prompt_token_ids"] == made[:length]
    assert answer["token_ids"] == made[length:]
    assert answer["text"] == processor.decode(made[length:], skip_special_tokens=True)


def test_help_lists_the_options() -> None:
    with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        main(["generate", "--help"])
    for name in ("--hf", "--prompt", "--image", "--max-new-tokens", "--do-sample", "--top-p", "--json"):
        assert name in out.getvalue()


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_mistakes_end_in_one_line(folder: Path, images: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(images[0]).read_bytes()[:500])
    start = ["--hf", str(folder), "--prompt"]
    expected: list[tuple[list[str], list[str]]] = [
        ([*start, "<image>", "--image", "/none.png"], ["image = '/none.png'", "no such file", "check the path"]),
        ([*start, "<image>", "--image", str(broken)], ["broken.png", "cannot be read", "copy it again"]),
        ([*start, "<image>", "--image", str(folder / "config.json")], ["config.json", "no picture", "JPEG or PNG"]),
        (
            [*start, "<image>", "--image", *images],
            ["tags in the prompt = 1", "2 images", "once for each of the images"],
        ),
        ([*start, "<image> <image>", "--image", images[0]], ["tags in the prompt = 2", "1 images"]),
        ([*start, "a", "--max-new-tokens", "600"], ["max_new_tokens = 600", "512 positions", "at most 510"]),
        ([*start, "a", "--top-p", "1.5"], ["--top-p = 1.5", "no probability", "use 1.0"]),
        ([*start, "a", "--seed", "9" * 30], ["--seed = 999", "is no seed"]),
        (["--prompt", "a"], ["--hf = ''", "is missing", "--hf FOLDER --prompt TEXT"]),
        (["--hf", str(folder)], ["--prompt = ''", "is missing"]),
    ]
    outcomes = spawn(run_commands, 1, [command for command, _ in expected])[0]
    for (code, out, err), (command, words) in zip(outcomes, expected, strict=True):
        assert (code, out) == (2, ""), command
        assert err.startswith("megavlm: error: ") and err.count("\n") == 1, err
        assert all(word in err for word in words), f"{words} in {err}"


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "spoil, options, expected",
    [
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            [],
            ["tokenizer of", "holds none of tokenizer.json", "copy the files"],
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{"),
            [],
            ["tokenizer of", "cannot be read", "copy its files again"],
        ),
        (
            lambda folder: write_tokenizer(folder, image_token_id=125),
            [],
            ["token of <image>", "= 125", "config.json says 127", "one folder"],
        ),
        (
            lambda folder: write_tokenizer(folder, chat_template=None),
            ["--chat"],
            ["--chat = ", "no chat format", "leave out --chat"],
        ),
        (
            lambda folder: edit_json(folder / "tokenizer.json", model={}),
            [],
            ["tokenizer of", "cannot be read", "copy its files again"],
        ),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
            [],
            ["tokenizer of", "cannot be read", "copy its files again"],
        ),
        (
            lambda folder: edit_json(
                folder / "tokenizer_config.json", chat_template="{{ raise_exception('no turns') }}"
            ),
            ["--chat"],
            ["--chat = ", "chat format fails: no turns", "mend chat_template"],
        ),
    ],
    ids=[
        "no tokenizer",
        "damaged tokenizer",
        "another tag",
        "no chat format",
        "a tokenizer of no kind",
        "a list of settings",
        "a chat format that fails",
    ],
)
def test_a_folder_with_a_wrong_tokenizer(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], object], options: list[str], expected: list[str]
) -> None:
    spoiled = tmp_path / "hf"
    shutil.copytree(folder, spoiled)
    (spoiled / "chat_template.jinja").unlink(missing_ok=True)
    spoil(spoiled)
    code, out, err = one(["--hf", str(spoiled), "--prompt", "a", *options])
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and all(word in err for word in expected), err


def test_pipeline_stages_are_refused_on_one_rank(folder: Path) -> None:
    command = ["--hf", str(folder), "--prompt", "a", "--pipeline-model-parallel-size", "2"]
    outcomes = [outcome for (outcome,) in spawn(run_commands, 2, [command])]
    assert [code for code, _, _ in outcomes] == [2, 2]
    (line,) = [err for _, _, err in outcomes if err]
    assert line.count("\n") == 1
    assert all(word in line for word in ["pipeline_model_parallel_size = 2", "use tensor parallelism"]), line
