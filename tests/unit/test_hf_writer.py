"""Writing Hugging Face folders: read back by our reader, by safetensors and by transformers, and safe when killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megavlm.checkpoint.atomic import open_staging
from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.checkpoint.hf_writer import HFWriter, PartIndex, finish
from megavlm.errors import ConfigError

EXTRA = {"config.json": b'{"hidden_size": 4}', "generation_config.json": b"{}"}


def tensors(count: int = 6) -> dict[str, Tensor]:
    """`count` tensors of 96 bytes."""
    generator = torch.Generator().manual_seed(3)
    dtypes = (torch.float32, torch.bfloat16)
    return {
        f"layers.{i}.weight": torch.randn(4, 6 * (1 + i % 2), generator=generator).to(dtypes[i % 2])
        for i in range(count)
    }


def write_part(
    staging: Path, state: dict[str, Tensor], part: tuple[int, int] | None = None, shard_bytes: int = 200
) -> PartIndex:
    with HFWriter(staging, max_shard_bytes=shard_bytes, part=part) as writer:
        for name, tensor in state.items():
            writer.add(name, tensor)
    return writer.close()


def write(final: Path, state: dict[str, Tensor], shard_bytes: int = 200, overwrite: bool = False) -> Path:
    staging = open_staging(final, overwrite)
    finish(staging, final, [write_part(staging, state, shard_bytes=shard_bytes)], EXTRA, overwrite)
    return final


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_state(folder: Path, expected: dict[str, Tensor]) -> None:
    with HFFolder.open(folder) as read:
        assert read.names() == sorted(expected)
        for name, tensor in expected.items():
            assert read.dtype(name) == tensor.dtype
            assert torch.equal(read.read(name), tensor)


def test_one_shard_is_written_without_an_index(tmp_path: Path) -> None:
    state = tensors()
    final = write(tmp_path / "out", state, shard_bytes=6 * 96)
    assert sorted(files(final)) == ["SHA256SUMS", "config.json", "generation_config.json", "model.safetensors"]
    assert_same_state(final, state)
    loaded = load_file(final / "model.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    with safe_open(final / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_shard_is_closed_before_it_grows_too_large(tmp_path: Path) -> None:
    state = tensors(5)
    state["huge"] = torch.ones(1000)
    final = write(tmp_path / "out", state)
    assert files(final)["config.json"] == EXTRA["config.json"]
    index = json.loads((final / "model.safetensors.index.json").read_bytes())
    shards = [f"model-{number:05d}-of-00004.safetensors" for number in (1, 1, 2, 2, 3, 4)]
    assert index["weight_map"] == dict(zip(state, shards, strict=True))
    assert index["metadata"]["total_size"] == 5 * 96 + 4000
    assert_same_state(final, state)


def test_several_writers_fill_one_folder(tmp_path: Path) -> None:
    state = tensors()
    names = list(state)
    staging = open_staging(tmp_path / "out")
    halves = [{name: state[name] for name in names[:3]}, {name: state[name] for name in names[3:]}]
    parts = [write_part(staging, halves[i], part=(i, 2), shard_bytes=100) for i in (1, 0)]  # any order of the parts
    finish(staging, tmp_path / "out", parts, EXTRA)
    assert files(tmp_path / "out") == files(write(tmp_path / "alone", state, shard_bytes=100))
    assert_same_state(tmp_path / "out", state)


def test_the_sums_hold(tmp_path: Path) -> None:
    final = write(tmp_path / "out", tensors())
    check = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=final, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr
    assert check.stdout.count(": OK") == len(files(final)) - 1


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    assert files(write(tmp_path / "a", tensors())) == files(write(tmp_path / "b", tensors()))


def test_weights_can_be_read_by_whoever_can_read_the_config(tmp_path: Path) -> None:
    final = write(tmp_path / "out", tensors())
    assert len({path.stat().st_mode for path in final.iterdir()}) == 1


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {"whole": base, "same": base, "transposed": base.t(), "part": base[1:2], "expanded": base[0, 0].expand(3)}
    staging = open_staging(tmp_path / "out")
    with HFWriter(staging) as writer:
        for name, view in views.items():
            writer.add(name, view)
        kept = {name: view.clone() for name, view in views.items()}
        base.zero_()  # what was added is the writer's own
    finish(staging, tmp_path / "out", [writer.close()], EXTRA)
    assert_same_state(tmp_path / "out", kept)


def test_a_name_is_written_once(tmp_path: Path) -> None:
    staging = open_staging(tmp_path / "out")
    with pytest.raises(AssertionError, match="a was added before"), HFWriter(staging) as writer:
        writer.add("a", torch.ones(1))
        writer.add("a", torch.ones(1))
    assert list(staging.iterdir()) == []  # nothing is written behind an error
    parts = [write_part(staging, {"a": torch.ones(1)}, part=(i, 2)) for i in range(2)]
    with pytest.raises(AssertionError, match=r"a is in model-00001-of-00002\.safetensors and in model-00002-of-00002"):
        finish(staging, tmp_path / "out", parts, EXTRA)
    assert not (tmp_path / "out").exists()


def test_all_parts_must_be_there(tmp_path: Path) -> None:
    staging = open_staging(tmp_path / "out")
    part = write_part(staging, tensors(), part=(0, 2))
    with pytest.raises(AssertionError, match="of=2"):
        finish(staging, tmp_path / "out", [part], EXTRA)


def test_an_existing_folder_is_replaced_only_on_demand(tmp_path: Path) -> None:
    final = write(tmp_path / "out", tensors(2))
    with pytest.raises(ConfigError, match="out': exists already; give another name, or allow overwriting"):
        write(final, tensors())
    assert_same_state(final, tensors(2))
    write(final, tensors(), overwrite=True)
    assert_same_state(final, tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import sys, time
import torch
from megavlm.checkpoint.atomic import open_staging
from megavlm.checkpoint.hf_writer import HFWriter

with HFWriter(open_staging(sys.argv[1]), max_shard_bytes=100) as writer:
    for i in range(3):
        writer.add(f"{i}", torch.ones(25))
    print("in the middle", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_no_folder_and_the_next_try_succeeds(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", KILLED, final], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "in the middle\n"
        child.kill()
    assert child.returncode == -signal.SIGKILL
    leftover = list(tmp_path.iterdir())
    assert len(leftover) == 1 and leftover[0] != final
    assert len(list(leftover[0].iterdir())) == 2  # it died with shards on disk
    state = tensors(2)
    write(final, state)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same_state(final, state)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("shard_bytes", [8192, 2**30])
def test_transformers_loads_what_we_write_and_we_what_it_writes(tmp_path: Path, shard_bytes: int) -> None:
    model = tiny_llama()
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model.save_pretrained(theirs, max_shard_size=shard_bytes)
    assert_same_state(theirs, model.state_dict())

    staging = open_staging(ours)
    part = write_part(staging, model.state_dict(), shard_bytes=shard_bytes)
    finish(staging, ours, [part], {"config.json": (theirs / "config.json").read_bytes()})
    loaded = AutoModelForCausalLM.from_pretrained(ours).eval()
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)

    weights = {name: content for name, content in files(ours).items() if name.startswith("model")}
    assert weights == {name: content for name, content in files(theirs).items() if name.startswith("model")}
    assert ("model.safetensors.index.json" in weights) == (shard_bytes == 8192)
