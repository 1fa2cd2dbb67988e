"""The commands on an Aquila-VL folder: export, proof, and questions, beside what transformers makes of the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aquila_folders import processor_of, tiny_model
from PIL import Image
from qwen_hf import write_tokenizer
from transformers import LlavaOnevisionForConditionalGeneration

from megavlm.cli import main
from megavlm.parallel import groups as process_groups
from megavlm.tiles import GridConfig


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `megavlm export-hf` wrote."""
    root = tmp_path_factory.mktemp("commands")
    tiny_model(root / "start", tied=True)
    write_tokenizer(root / "start")
    options = ["--hf", str(root / "start"), "--out", str(root / "hf"), "--params-dtype", "float32"]
    assert main(["export-hf", *options]) == 0
    return root / "hf"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A photograph lying on its side, a palette with a hole, a line, and frames."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(4)
    turned = Image.fromarray(draw.integers(0, 256, (60, 170, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(root / "turned.png", exif=exif)
    palette = Image.fromarray(draw.integers(0, 9, (40, 50), dtype=np.uint8), "P")
    palette.putpalette(draw.integers(0, 256, 27, dtype=np.uint8).tolist())
    palette.save(root / "palette.png", transparency=3)
    Image.fromarray(draw.integers(0, 256, (1, 200, 3), dtype=np.uint8)).save(root / "line.png")
    return [str(root / name) for name in ("turned.png", "palette.png", "line.png")]


def asked(exported: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["generate", "--hf", str(exported), "--chat", "--json", "--max-new-tokens", "8", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.parametrize("files", [[0], [2], [1, 0], []], ids=["turned", "line", "two", "text"])
def test_answers_are_those_of_transformers(
    files: list[int], exported: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the exported folder, with its own processor and chat format: the same tokens in and out."""
    chosen = [pictures[number] for number in files]
    question = "<image>\n" * len(chosen) + "What is in the picture?"
    options = ["--image", *chosen] if chosen else []
    ours = asked(exported, capsys, "--prompt", question, *options)
    processor = processor_of(exported)
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
    content = [*({"type": "image"} for _ in chosen), {"type": "text", "text": "What is in the picture?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    # As transformers' own `load_image` opens them.
    arrays = [np.asarray(upright(file)) for file in chosen]
    inputs = processor(
        images=[arrays] if arrays else None, text=text, return_tensors="pt", input_data_format="channels_last"
    )
    assert ours["prompt_token_ids"] == inputs["input_ids"][0].tolist()
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert ours["token_ids"] == answer[0, inputs["input_ids"].size(1) :].tolist()


def upright(file: str) -> Image.Image:
    from PIL.ImageOps import exif_transpose

    image = exif_transpose(Image.open(file))
    assert image is not None
    return image.convert("RGB")


def test_a_video_is_read_from_its_frames(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(6)
    for number in range(3):
        Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    found = asked(exported, capsys, "--prompt", "<video>\nWhat happens?", "--video", str(tmp_path))
    tokens = GridConfig(tile_size=98).tokens_per_frame
    video = max(set(found["prompt_token_ids"]), key=found["prompt_token_ids"].count)
    assert found["prompt_token_ids"].count(video) == 3 * tokens + 1


@pytest.mark.parametrize("layout", ["transformers", "llava-next"])
def test_a_folder_is_proven_against_transformers(
    layout: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one in LLaVA-NeXT's layout, from cases that were kept."""
    cases = tmp_path / "cases.safetensors"
    assert main(["verify-hf", "--hf", str(exported), "--against", "transformers", "--save-cases", str(cases)]) == 0
    assert "mixed batch" in capsys.readouterr().out and cases.is_file()
    if layout == "llava-next":
        out = str(tmp_path / "next")
        options = ["--hf", str(exported), "--out", out, "--layout", layout, "--params-dtype", "float32"]
        assert main(["export-hf", *options]) == 0
        assert main(["verify-hf", "--hf", out, "--cases", str(cases)]) == 0
        # transformers would make up a model of its default size and random weights.
        assert main(["verify-hf", "--hf", out, "--against", "transformers"]) == 2
        assert "cannot read LLaVA-NeXT's layout" in capsys.readouterr().err


def test_a_model_of_single_tiles_is_proven_as_transformers_reads_it(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads two tiles with newlines, so the weights can be compared, and the tiling cannot."""
    out = str(tmp_path / "stage-1")
    single = ["--params-dtype", "float32", "aquila_vl.grid.tiling=single"]
    assert main(["export-hf", "--hf", str(exported), "--out", out, *single]) == 0
    capsys.readouterr()
    command = ["verify-hf", "--hf", out, "--against", "transformers"]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not how transformers cuts the images of this folder; add " in line
    advice = line.partition("; add ")[2].partition(", or")[0].split()
    assert len(advice) == 3 and main([*command, *advice]) == 0


def test_gradients_of_frozen_parts_are_not_compared(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify-hf", "--hf", str(exported), "--against", "transformers", "--json"]
    assert main([*command, "--trainable", "projector", "newline"]) == 0
    compared = {one["what"] for one in json.loads(capsys.readouterr().out.splitlines()[-1])}
    gradients = {what.removeprefix("gradient of ") for what in compared if what.startswith("gradient of ")}
    assert gradients == {"image_newline"} | {
        f"multi_modal_projector.linear_{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")
    }


def test_a_changed_weight_is_found(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = tmp_path / "cases.safetensors"
    assert main(["verify-hf", "--hf", str(exported), "--against", "transformers", "--save-cases", str(cases)]) == 0
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        model.model.image_newline[3] += 0.5
    model.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    assert main(["verify-hf", "--hf", str(tmp_path / "other"), "--cases", str(cases)]) == 1
    assert "TOO FAR" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["verify-hf", "--hf", "HF"], "or --against is what the model is held to"),
        (["verify-hf", "--hf", "HF", "--against", "llama.cpp"], "is nothing to compare with"),
        (["verify-hf", "--hf", "HF", "--against", "transformers", "--save-cases", "HF"], "exists already"),
        (["verify-hf", "--hf", "HF", "--against", "transformers", "--save-cases", "/nowhere/c"], "cannot be written"),
        (
            ["verify-hf", "--hf", "HF", "--against", "transformers", "aquila_vl.grid.cap_tiles=3"],
            "grid.cap_tiles=5, or",
        ),
        (["generate", "--hf", "HF", "--prompt", "<image> x"], "0 images come with it"),
        (["generate", "--hf", "HF", "--prompt", "<video> x"], "0 videos come with it"),
        (["generate", "--hf", "HF", "--prompt", "x", "--video", "v.mp4"], "1 videos come with it"),
    ],
)
def test_mistakes_end_in_one_line(
    command: list[str], expected: str, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.replace("HF", str(exported)) if word == "HF" else word for word in command]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert expected in line


def test_what_transformers_refuses_in_config_json_ends_in_one_line(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads the file along with the tokenizer, and complains in several lines of its own."""
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((exported / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_config": "siglip"}))
    assert main(["generate", "--hf", str(tmp_path), "--prompt", "a"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megavlm: error: ") and "vision_config" in line


@pytest.mark.parametrize("section, key", [("text_config", "vocab_size"), ("vision_config", "intermediate_size")])
def test_no_memory_is_taken_for_sizes_that_the_weights_lack(
    section: str, key: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((exported / "config.json").read_text())
    config[section][key] = 10**12
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["export-hf", "--hf", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "the model needs the shape (1000000000000, 3" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _leave() -> Any:
    yield
    process_groups.leave()
