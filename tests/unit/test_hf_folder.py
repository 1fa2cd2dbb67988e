"""Reading Hugging Face folders: every value bit by bit, every kind of damage refused when the folder is opened."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.errors import WeightsError

CONFIG = {"architectures": ["TinyForCausalLM"], "hidden_size": 6}
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "embed.weight": torch.randn(8, 6, generator=generator),
        "head.weight": torch.randn(8, 6, generator=generator).bfloat16(),
        "norm.weight": torch.randn(6, generator=generator).half(),
        "conv.weight": torch.randn(4, 3, 2, 2, generator=generator),
        "steps": torch.tensor(5),
    }


def config_only(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def single(folder: Path) -> Path:
    save_file(tensors(), config_only(folder) / "model.safetensors", metadata={"format": "pt"})
    return folder


def split() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    state = tensors()
    second = {name: state.pop(name) for name in ("conv.weight", "steps")}
    return state, second


def write_index(folder: Path, weight_map: object, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def sharded(folder: Path) -> Path:
    first, second = split()
    save_file(first, config_only(folder) / FIRST)
    save_file(second, folder / SECOND)
    write_index(folder, dict.fromkeys(first, FIRST) | dict.fromkeys(second, SECOND))
    return folder


def single_bin(folder: Path) -> Path:
    torch.save(OrderedDict(tensors()), config_only(folder) / "pytorch_model.bin")
    return folder


def sharded_bin(folder: Path) -> Path:
    first, second = split()
    torch.save(first, config_only(folder) / "pytorch_model-00001-of-00002.bin")
    torch.save(second, folder / "pytorch_model-00002-of-00002.bin")
    weight_map = dict.fromkeys(first, "pytorch_model-00001-of-00002.bin")
    weight_map |= dict.fromkeys(second, "pytorch_model-00002-of-00002.bin")
    write_index(folder, weight_map, "pytorch_model.bin.index.json")
    return folder


def same_bits(a: Tensor, b: Tensor) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def refusal(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        HFFolder.open(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("make", [single, sharded, single_bin, sharded_bin])
def test_tensors_and_their_parts_are_read_bit_by_bit(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with HFFolder.open(make(tmp_path)) as folder:
        assert folder.config == CONFIG
        assert folder.names() == sorted(tensors())
        for name, expected in tensors().items():
            assert folder.shape(name) == tuple(expected.shape)
            assert folder.dtype(name) == expected.dtype
            assert same_bits(folder.read(name), expected)
            for start, stop in ((0, 2), (1, 3), (2, 2)):
                if expected.dim() > 0:
                    assert same_bits(folder.read_rows(name, start, stop), expected[start:stop])
                if expected.dim() > 1:
                    assert same_bits(folder.read_columns(name, start, stop), expected[:, start:stop])


@pytest.mark.parametrize("make", [single, single_bin])
def test_what_was_read_is_owned_by_the_reader(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    with HFFolder.open(make(tmp_path)) as folder:
        rows, columns = folder.read_rows("embed.weight", 2, 4), folder.read_columns("embed.weight", 2, 4)
        folder.read("embed.weight").zero_()
        assert same_bits(folder.read("embed.weight"), tensors()["embed.weight"])
    for file in tmp_path.iterdir():
        os.truncate(file, 0)  # a view of the mapped file would now end the process
    assert same_bits(rows, tensors()["embed.weight"][2:4])
    assert same_bits(columns, tensors()["embed.weight"][:, 2:4])
    for part in (rows, columns):
        assert part.is_contiguous() and part.untyped_storage().nbytes() == part.nbytes


def test_safetensors_come_before_bin_and_an_index_before_a_single_file(tmp_path: Path) -> None:
    torch.save({"from": torch.tensor(3)}, config_only(tmp_path) / "pytorch_model.bin")
    for name, value in (("model.safetensors", 2), ("shard.safetensors", 1)):
        save_file({"from": torch.tensor(value)}, tmp_path / name)
    write_index(tmp_path, {"from": "shard.safetensors"})
    for expected, entry in enumerate((INDEX, "model.safetensors", "pytorch_model.bin"), 1):
        with HFFolder.open(tmp_path) as folder:
            assert folder.read("from") == expected
        (tmp_path / entry).unlink()


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / "none")
    assert "none" in message and "no such folder" in message and "hf download" in message


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    message = refusal(config_only(tmp_path))
    for name in (INDEX, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin"):
        assert name in message
    assert "copy or download the weights" in message


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    (single(tmp_path) / "config.json").unlink()
    assert "config.json is missing; copy or download it" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content, problem", [(b"{'a': 1}", "is not JSON"), (b"\xff{}", "is not JSON"), (b"[]", "JSON object")]
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_bad_json_is_refused(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (sharded(tmp_path) / name).write_bytes(content)
    message = refusal(tmp_path)
    assert str(tmp_path / name) in message and problem in message and "download it again" in message


def test_an_index_without_a_weight_map_is_refused(tmp_path: Path) -> None:
    for weight_map in (None, ["a"], {"a": 1}):
        write_index(sharded(tmp_path), weight_map)
        message = refusal(tmp_path)
        assert f"weight_map of {tmp_path / INDEX} = {weight_map}" in message and "file for each tensor" in message


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    (sharded(tmp_path) / SECOND).unlink()
    message = refusal(tmp_path)
    assert SECOND in message and str(tmp_path / INDEX) in message and "download it again" in message


def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    write_index(config_only(tmp_path / "folder"), {"a": "../outside.safetensors"})
    assert "'../outside.safetensors': there is no such file" in refusal(tmp_path / "folder")


def test_a_tensor_that_its_shard_lacks_is_refused(tmp_path: Path) -> None:
    first, second = split()
    write_index(sharded(tmp_path), dict.fromkeys(first, FIRST) | dict.fromkeys([*second, "lost.weight"], SECOND))
    message = refusal(tmp_path)
    assert "'lost.weight'" in message and f"{SECOND} holds no such tensor" in message and "one place" in message


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    first, second = split()
    save_file({**second, "norm.weight": first["norm.weight"]}, sharded(tmp_path) / SECOND)
    message = refusal(tmp_path)
    assert "'norm.weight'" in message and f"both in {FIRST} and in {SECOND}" in message and "one place" in message


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with HFFolder.open(single(tmp_path)) as folder:
        for read in (folder.read, folder.shape, folder.dtype):
            with pytest.raises(WeightsError, match=r"'embd\.weight': the folder holds no tensor.*embed\.weight"):
                read("embd.weight")
        with pytest.raises(WeightsError, match=r"its names start.*conv\.weight"):
            folder.read("???")


def test_a_safetensors_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    # The last shard: all are checked before the first tensor can be read.
    file = sharded(tmp_path) / SECOND
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 5, 8, header // 2, header - 1, header, header + 1, len(whole) - 1):
        file.write_bytes(whole[:length])
        message = refusal(tmp_path)
        assert f"size of {file} = {length}:" in message and "copy or download it again" in message
        if length >= header:
            assert f"promises {len(whole)} bytes" in message


def test_bytes_after_the_last_tensor_are_refused(tmp_path: Path) -> None:
    file = single(tmp_path) / "model.safetensors"
    size = file.stat().st_size
    with file.open("ab") as stream:
        stream.write(b"more")
    message = refusal(tmp_path)
    assert f"size of {file} = {size + 4}: its header promises {size} bytes" in message and "again" in message


def test_no_flipped_bit_of_the_header_changes_a_tensor(tmp_path: Path) -> None:
    file = single(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    refused = 0
    for position in range(8 + int.from_bytes(whole[:8], "little")):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 7
        file.write_bytes(damaged)
        try:
            folder = HFFolder.open(tmp_path)
        except WeightsError as error:
            refused += 1
            assert str(file) in str(error) and "again" in str(error)
            continue
        # Accepted only where the flip hit a name or the metadata: whoever asks for the old name is told.
        for name in set(folder.names()) & set(tensors()):
            assert same_bits(folder.read(name), tensors()[name])
        folder.close()
    assert refused > 200


@pytest.mark.parametrize(
    "entry, problem",
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "8 bytes from 0 on expected, [0, 4] found"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "4 bytes from 0 on expected, [4, 8] found"),
        ({"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}, "unknown dtype F31"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "shape [-1]"),
        ({"dtype": "F32", "shape": [1]}, "data_offsets"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "the safetensors library refuses it"),
        (3, "is damaged"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, entry: object, problem: str) -> None:
    header = json.dumps({"a": entry}).encode()
    file = config_only(tmp_path) / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8 if "[4, 8]" in problem else 4))
    message = refusal(tmp_path)
    assert f"header of {file}" in message and problem in message and "again" in message


def test_an_old_torch_file_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    folder = config_only(tmp_path / "a folder's name")
    file = folder / "pytorch_model.bin"
    torch.save(tensors(), file, _use_new_zipfile_serialization=False)
    message = refusal(folder)
    assert str(file) in message and "torch before 1.6" in message
    command = shlex.split(message.split("convert it once: ")[1])
    assert command[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "pytorch_model.bin"]
    with HFFolder.open(folder) as converted:
        assert all(same_bits(converted.read(name), tensor) for name, tensor in tensors().items())


def test_a_bin_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    file = single_bin(tmp_path) / "pytorch_model.bin"
    whole = file.read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        file.write_bytes(whole[:length])
        message = refusal(tmp_path)
        assert str(file) in message and "copy or download it again" in message


class MakesAFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_bin_file_runs_no_code(tmp_path: Path) -> None:
    file = config_only(tmp_path) / "pytorch_model.bin"
    torch.save({"a": torch.ones(1), "b": MakesAFolder(tmp_path / "made")}, file)
    message = refusal(tmp_path)
    assert f"content of {file}" in message and ".mkdir': is neither a tensor" in message and "; save " in message
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "state, problem",
    [
        ({"a": OrderedDict(b=torch.nn.Linear(1, 1))}, "'torch.nn.modules.linear.Linear': is neither a tensor"),
        ({"state_dict": {"a": torch.ones(1), "b": torch.ones(1)}}, "'state_dict': is a nested dict of 2 entries"),
        ({"module": {"a": torch.ones(1)}}, "'module': is a nested dict of 1 entries"),
        ({"a": torch.ones(1), "epoch": 3}, "'epoch': is of type int"),
        ({3: torch.ones(1)}, "= 3: is of type Tensor, where a name and its tensor belong"),
        ([torch.ones(1)], "'list': is no dict of names and tensors"),
    ],
)
def test_a_bin_file_of_anything_but_tensors_is_refused(tmp_path: Path, state: object, problem: str) -> None:
    file = config_only(tmp_path) / "pytorch_model.bin"
    torch.save(state, file)
    message = refusal(tmp_path)
    assert f"content of {file}" in message and problem in message and "; save " in message


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_refused(tmp_path: Path, name: str) -> None:
    (config_only(tmp_path) / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    message = refusal(tmp_path)
    assert str(tmp_path / name) in message and "git-lfs pointer" in message and "git lfs pull" in message


MEASURE = """
import sys
from pathlib import Path
import torch
from megavlm.checkpoint.hf_folder import HFFolder

def anonymous_mb():
    # Anonymous memory only: pages of the mapped file belong to the page cache, which gives them back when asked.
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) // 1024

with HFFolder.open(sys.argv[1]) as folder:
    folder.read_rows("small", 0, 1)
    before = anonymous_mb()
    rows = folder.read_rows("large", 1000, 2000)
    columns = folder.read_columns("large", 100, 200)
    parts = anonymous_mb() - before
    whole = folder.read("large")
    print(parts, anonymous_mb() - before, rows.shape == (1000, 8192), columns.shape == (8192, 100))
"""


@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_a_part_costs_the_memory_of_the_part(tmp_path: Path, format: str) -> None:
    state = {"large": torch.zeros(8192, 8192), "small": torch.zeros(2, 2)}
    file = config_only(tmp_path) / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[format]
    if format == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    child = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True)
    file.unlink()  # pytest keeps the folders of several runs
    parts, whole, *shapes = child.stdout.split()
    assert shapes == ["True", "True"]
    assert 30 <= int(parts) < 64  # rows and columns hold 35 MB
    assert 256 <= int(whole) - int(parts) < 300
