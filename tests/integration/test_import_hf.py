"""`megavlm import-hf` and `export-hf` for Aquila-VL: what is wrong ends in one line, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aquila_folders import IMAGE, folder_tensors, next_config, next_tensors, tiny_model, write_next_folder
from qwen_hf import write_tokenizer
from safetensors.torch import load_file, save_file

from megavlm.cli import main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model: `hf` as transformers keeps it, `next` as LLaVA-NeXT does."""
    root = tmp_path_factory.mktemp("source")
    model = tiny_model(root / "hf", tied=False)
    write_tokenizer(root / "hf")
    write_next_folder(root / "next", next_tensors(model), next_config(model))
    return root


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def of_another_width(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "patch_embedding" in name:
            tensors[name] = torch.cat([tensor, tensor])
    save_file(tensors, folder / "model.safetensors")


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def without_tags(folder: Path) -> None:
    """The tokenizer lacks them, and the config has the numbers of transformers' defaults."""
    write_tokenizer(folder, media_tokens=False)
    configured(image_token_index=IMAGE - 1)(folder)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def tied_in_words_only(folder: Path) -> None:
    configured(tie_word_embeddings=True)(folder)


@pytest.mark.parametrize(
    ("layout", "damage", "message"),
    [
        ("hf", configured(model_type="bert"), "model_type = 'bert': is no model with eyes that is known here"),
        ("next", configured(mm_projector_type="linear"), "mm_projector_type = 'linear': only 'mlp2x_gelu'"),
        ("next", configured(image_grid_pinpoints=[[98, 98], [98, 196]]), "is not every grid from (1x1)"),
        ("hf", of_another_width, "the model needs the shape (36, 3, 14, 14)"),
        ("hf", without_tokenizer, "the folder holds none of tokenizer.json"),
        ("hf", configured(image_token_index=151646), f"token of <image> = 151646: the tokenizer says {IMAGE}"),
        ("hf", without_tags, f"token of <image> = {IMAGE - 1}: the tokenizer says {IMAGE}"),
        ("next", tied_in_words_only, "differs from model.embed_tokens.weight, although config.json says tie_word"),
        ("next", cut, "model.safetensors"),
    ],
)
def test_folders_that_cannot_be_taken(
    layout: str, damage: Callable[[Path], None], message: str, source: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in (source / layout).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    assert the_line(["import-hf", "--hf", str(folder), "--out", str(tmp_path / "out")], capsys).count(message) == 1
    assert not (tmp_path / "out").exists()


def the_line(arguments: list[str], capsys: Any) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    said = str(capsys.readouterr().err)
    assert said.startswith("megavlm: error: ") and said.count("\n") == 1, said
    return said


def test_a_folder_of_both_layouts_by_the_command_line(source: Path, tmp_path: Path, capsys: Any) -> None:
    ours, again, hf = (str(tmp_path / name) for name in ("ours", "again", "hf"))
    assert main(["import-hf", "--hf", str(source / "next"), "--out", ours]) == 0
    assert f"<image> is token {IMAGE}, added to the tokenizer" in capsys.readouterr().out
    assert main(["import-hf", "--hf", str(source / "hf"), "--out", again]) == 0
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
    exported = ["export-hf", "--hf", ours, "--out", hf, "--params-dtype", "bfloat16"]
    assert main([*exported, "--layout", "llava-next"]) == 0
    original = {name for name in folder_tensors(source / "next") if not name.endswith("inv_freq")}
    assert folder_tensors(tmp_path / "hf").keys() == original
    sums = (tmp_path / "hf" / "SHA256SUMS").read_text()
    assert "model.safetensors" in sums and "tokenizer.json" in sums
    assert "exists already" in the_line([*exported, "--layout", "transformers"], capsys)
    assert "exists already" in the_line(["import-hf", "--hf", str(source / "hf"), "--out", ours], capsys)
    assert "--layout = 'gguf': is not known; use one of transformers" in the_line(
        ["export-hf", "--hf", ours, "--out", str(tmp_path / "x"), "--layout", "gguf"], capsys
    )


def test_parts_that_do_not_make_a_model(source: Path, tmp_path: Path, capsys: Any) -> None:
    def line(**options: str | Path) -> str:
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return the_line(["import-hf", *arguments, "--out", str(tmp_path / "out")], capsys)

    assert "model_type = 'llava_onevision': is no decoder known here" in line(llm=source / "hf", siglip=source / "hf")
    llm = tmp_path / "llm"
    llm.mkdir()
    tensors = {
        name.removeprefix("language_model."): tensor
        for name, tensor in folder_tensors(source / "hf").items()
        if name.startswith("language_model.")
    }
    save_file(tensors, llm / "model.safetensors")
    text = json.loads((source / "hf" / "config.json").read_text())["text_config"]
    (llm / "config.json").write_text(json.dumps({**text, "model_type": "qwen2", "tie_word_embeddings": False}))
    as_next = ["export-hf", "--hf", str(llm), "--out", str(tmp_path / "out"), "--layout", "llava-next"]
    assert "layout = 'llava-next': is one of Aquila-VL's folders alone" in the_line(as_next, capsys)
    assert "model_type = 'llava_onevision': is no SigLIP" in line(llm=llm, siglip=source / "hf")
    tower = source / "hf" / "model.safetensors"
    assert "tensors" in line(llm=llm, siglip=tower)
    assert "--seed = 'x': is no whole number" in line(llm=llm, siglip=tower, seed="x")
    assert "there is no such file" in line(llm=llm, siglip=source / "none")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_process_alone(
    rank: str, source: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several would clear away and rename one another's files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert main(["import-hf", "--hf", str(source / "hf"), "--out", str(tmp_path / "out")]) == 2
    line = "megavlm: error: processes = 2: import-hf is the work of one; start it without torchrun\n"
    assert capsys.readouterr().err == (line if rank == "0" else "")
    assert not (tmp_path / "out").exists()
