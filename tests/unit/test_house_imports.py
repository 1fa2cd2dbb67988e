"""Who may import whom: the table of rooms as data, and every source of the package held against it."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase

import pytest
from python_source import ROOT, Use, module_name, python_files, relative, uses

BASE_MODULES = ("config", "options", "errors", "log", "batch", "tiles", "signals", "ranges")
"""The modules (or folders) directly under megavlm/ that are the room `base`."""

ROOMS: dict[str, dict[str, tuple[str, ...]]] = {
    "base": {"rooms": ("base",), "packages": ("yaml",)},
    "platform": {"rooms": ("base",), "packages": ()},
    "megavlm_kernels": {"rooms": (), "packages": ("triton",)},
    "data": {
        "rooms": ("base", "megavlm_kernels"),
        "packages": (
            "scipy",
            "pyarrow",
            "fsspec",
            "tokenizers",
            "sentencepiece",
            "transformers.*Tokenizer*",
            "transformers.tokenization_*",
            "PIL",
            "nvidia.dali",
            "webdataset",
            "megatron.energon",
        ),
    },
    "model": {"rooms": ("base", "megavlm_kernels"), "packages": ("megatron.core",)},
    "parallel": {"rooms": ("base", "platform", "model"), "packages": ("megatron.core",)},
    "checkpoint": {"rooms": ("base", "model", "parallel"), "packages": ("megatron.core", "safetensors")},
    "build": {"rooms": ("base", "platform", "model", "parallel", "checkpoint", "data"), "packages": ()},
    "train": {
        "rooms": ("base", "build", "data", "model", "parallel", "checkpoint"),
        "packages": ("megatron.core",),
    },
    "export": {
        "rooms": ("base", "build", "model", "parallel", "checkpoint"),
        "packages": (
            "transformers.*Config",
            "transformers.configuration_*",
            "transformers.*Tokenizer*",
            "transformers.tokenization_*",
        ),
    },
    "infer": {
        "rooms": ("base", "build", "data", "model", "parallel", "checkpoint", "export"),
        "packages": (),
    },
    "plan": {"rooms": ("base", "build", "data", "model", "parallel"), "packages": ()},
    "curriculum": {"rooms": ("base", "build", "train", "parallel", "checkpoint", "export"), "packages": ()},
    "recipes": {"rooms": ("base", "build"), "packages": ()},
    # The toy world's models from their bases to their answers; what it starts as a process of its own, it imports not.
    "toy": {
        "rooms": ("base", "data", "model", "build", "parallel", "checkpoint", "export", "recipes"),
        "packages": ("safetensors", "tokenizers", "transformers", "PIL"),
    },
    "testing": {"rooms": ("base",), "packages": ()},
    # Code that exported folders carry: transformers runs it where megavlm is not installed.
    "exported files": {"rooms": (), "packages": ("transformers", "PIL")},
}
"""Room -> the rooms and the third-party names (prefixes or patterns) that it may import, beside its own modules, the
standard library and the packages in EVERYWHERE. A missing room (cli, bench) may import anything."""

EVERYWHERE = ("torch", "numpy")
EXPORTED_FILES = "megavlm.export.infimm_files"
FREE_ROOMS = (
    *("cli", "commands", "data_commands", "plan_commands", "bench", "__main__"),
    *("scripts", "example_runs", "toys", "torchrun"),  # behind the launch scripts of examples/
)
EXTRA_PACKAGES = {
    "megavlm.infer.record": ("transformers", "safetensors"),
    "megavlm.platform.cpu": ("megatron.core",),
    "megavlm.train.callbacks.weights_and_biases": ("wandb",),
}
"""Single modules that may import more than their room."""

FORBIDDEN_EVERYWHERE = ("megatron.training", "megatron.legacy")
GROUP_STATE = ("megatron.core.parallel_state", "megatron.core.mpu")
FORBIDDEN_IN_ROOM = {
    "data": ("torch.distributed",),
    "model": ("torch.distributed.get_rank", "torch.distributed.get_world_size", "torch.distributed.new_group"),
}
"""Names that count wherever they are used, not only where they are imported: ranks and groups arrive as arguments."""

CPU_ADAPTER = "megavlm.platform.cpu"
CPU_ADAPTER_DOOR = "megavlm/platform/machine.py"

SOURCES = python_files("megavlm", "kernels/megavlm_kernels", "tools", "examples")


def room_of(dotted_name: str) -> str:
    """The room that a module of ours belongs to."""
    if is_under(dotted_name, (EXPORTED_FILES,)):
        return "exported files"
    first, _, rest = dotted_name.partition(".")
    if first == "megavlm_kernels":
        return first
    part = rest.split(".")[0]
    return part if part in (*ROOMS, *FREE_ROOMS) and part != "base" else "base"


def is_under(name: str, allowed: tuple[str, ...]) -> bool:
    """Whether the name is, or lies below, one of these names or patterns."""
    return any(name == one or name.startswith(one + ".") or fnmatchcase(name, one) for one in allowed)


def refusal(use: Use, path: str) -> str | None:
    """Why this use is against the rules, with what is allowed instead; None when it is fine."""
    module = module_name(path)
    is_ours = path.startswith(("megavlm/", "kernels/megavlm_kernels/"))
    room = room_of(module) if is_ours else "tools"
    if is_under(use.name, FORBIDDEN_EVERYWHERE):
        return "imported nowhere: only megatron.core is part of the package we depend on"
    if is_under(use.name, GROUP_STATE) and room != "parallel":
        return "only the room `parallel` knows megatron-core's group state; take groups as arguments"
    if is_under(use.name, (CPU_ADAPTER,)) and module != CPU_ADAPTER and not (path == CPU_ADAPTER_DOOR and use.function):
        return f"only a function of {CPU_ADAPTER_DOOR} may import the CPU adapter, where there is no CUDA"
    if is_under(use.name, ("megavlm.testing",)) and module != "megavlm.testing":
        return "megavlm.testing is for tests only"
    if is_under(use.name, FORBIDDEN_IN_ROOM.get(room, ())):
        return f"the room `{room}` takes devices, ranks and groups as plain arguments"
    if not use.is_import or room == "tools" or room in FREE_ROOMS:
        return None
    return _refusal_of_import(use.name, module, room)


def _refusal_of_import(name: str, module: str, room: str) -> str | None:
    first = name.split(".")[0]
    rooms = tuple(dict.fromkeys((room, *ROOMS[room]["rooms"])))
    packages = (*EVERYWHERE, *ROOMS[room]["packages"], *EXTRA_PACKAGES.get(module, ()))
    if first in sys.stdlib_module_names or first == "__future__":
        return None
    allowed = room_of(name) in rooms if first in ("megavlm", "megavlm_kernels") else is_under(name, packages)
    return None if allowed else f"the room `{room}` may import the rooms {', '.join(rooms)} and {', '.join(packages)}"


def refusals(source: str, path: str) -> list[str]:
    """One line for each use in this source that breaks a rule."""
    found = ((use, refusal(use, path)) for use in uses(source, path))
    return [f"{path}:{use.line}: {use.name}: {why}" for use, why in found if why]


def test_every_import_follows_the_table() -> None:
    assert SOURCES
    found = [line for path in SOURCES for line in refusals(path.read_text(encoding="utf-8"), relative(path))]
    assert not found, "\n" + "\n".join(found)


def test_every_module_under_megavlm_has_a_room() -> None:
    known = {*ROOMS, *FREE_ROOMS, *BASE_MODULES, "__init__"} - {"base", "megavlm_kernels"}
    found = {path.stem for path in (ROOT / "megavlm").iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert found <= known, f"no room in the table for {sorted(found - known)}"


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        (
            "megavlm/config.py",
            "import megavlm.build",
            "the room `base` may import the rooms base and torch, numpy, yaml",
        ),
        ("megavlm/data/order.py", "import torch.distributed as dist", "plain arguments"),
        ("megavlm/data/order.py", "import torch\nrank = torch.distributed.get_rank()", "plain arguments"),
        ("megavlm/data/chat.py", "from transformers import AutoModel", "the room `data` may import"),
        ("megavlm/model/spec.py", "from megatron.core import parallel_state", "only the room `parallel`"),
        ("megavlm/model/spec.py", "import megatron.core as mc\nmc.parallel_state.x()", "only the room `parallel`"),
        ("megavlm/model/spec.py", "import torch.distributed as dist\ndist.get_rank()", "the room `model` takes"),
        ("megavlm/model/infimm/spec.py", "from ...parallel import groups", "the room `model` may import"),
        ("megavlm/model/spec.py", "def f():\n    import safetensors", "the room `model` may import"),
        ("megavlm/model/spec.py", "import importlib\nimportlib.import_module('apex')", "the room `model` may import"),
        ("megavlm/parallel/groups.py", "import megatron.training.arguments", "imported nowhere"),
        ("megavlm/parallel/groups.py", "from megavlm.platform import cpu", "only a function of"),
        ("megavlm/platform/machine.py", "from . import cpu", "only a function of"),
        ("megavlm/train/loop.py", "from megavlm.testing import spawn", "for tests only"),
        ("megavlm/infer/generate.py", "import transformers", "the room `infer` may import"),
        ("kernels/megavlm_kernels/norm/op.py", "from megavlm import errors", "the room `megavlm_kernels` may"),
        ("megavlm/export/infimm_files/x.py", "from megavlm.errors import ConfigError", "the room `exported files` may"),
        ("megavlm/export/infimm_files/x.py", "import torchvision", "the room `exported files` may"),
        ("megavlm/export/infimm_folder.py", "from .infimm_files import modeling_infimm", "the room `export` may"),
        ("tools/convert.py", "import megatron.training", "imported nowhere"),
    ],
)
def test_a_wrong_import_is_refused(path: str, source: str, reason: str) -> None:
    found = refusals(source, path)
    assert found
    assert all(line.startswith(f"{path}:") and reason in line for line in found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megavlm/platform/machine.py", "def prepare():\n    from . import cpu"),
        ("megavlm/parallel/groups.py", "from megatron.core import parallel_state\nparallel_state.x()"),
        ("megavlm/data/chat.py", "from transformers import AutoTokenizer\nfrom PIL import Image"),
        ("megavlm/infer/record.py", "from transformers import AutoModelForCausalLM"),
        ("megavlm/cli.py", "import megavlm.train.loop, rich"),
        ("megavlm/model/norms.py", "import megavlm_kernels\nfrom ..errors import ConfigError"),
        ("tools/convert.py", "import transformers"),
        ("megavlm/export/infimm_files/x.py", "from .y import z\nfrom PIL import Image\nimport transformers"),
    ],
)
def test_a_right_import_passes(path: str, source: str) -> None:
    assert refusals(source, path) == []
