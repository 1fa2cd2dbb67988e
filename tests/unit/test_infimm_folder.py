"""Code, processor and chat format of exported InfiMM folders."""

from __future__ import annotations

import ast
import json

import pytest

from megavlm.errors import ConfigError
from megavlm.export.infimm_folder import architecture, auto_map, infimm_files, processor_files

MODEL_TYPES = ("infimm-zephyr", "infimm-vicuna", "infimm-llama")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_class_that_is_named_exists(model_type: str) -> None:
    classes = {
        f"{name.removesuffix('.py')}.{node.name}"
        for name, source in infimm_files().items()
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }
    assert set(auto_map(model_type).values()) <= classes
    assert f"modeling_infimm.{architecture(model_type)}" == auto_map(model_type)["AutoModelForCausalLM"]
    others = processor_files(model_type, 224)
    assert set(json.loads(others["processor_config.json"])["auto_map"].values()) <= classes
    assert json.loads(others["preprocessor_config.json"])["image_size"] == 224


def test_the_files_import_nothing_that_a_user_of_the_folder_lacks() -> None:
    files = infimm_files()
    assert sorted(files) == [
        "configuration_infimm.py",
        "image_processing_infimm.py",
        "modeling_infimm.py",
        "processing_infimm.py",
        "vision_infimm.py",
    ]
    for name, source in files.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in files, f"{name} imports {node.module}"


def test_an_unknown_model_type_is_refused() -> None:
    message = "model_type = 'infimm-gpt': is no InfiMM; use one of infimm-zephyr, infimm-vicuna, infimm-llama"
    for call in (architecture, auto_map, lambda kind: processor_files(kind, 224)):
        with pytest.raises(ConfigError) as caught:
            call("infimm-gpt")
        assert message in str(caught.value)
