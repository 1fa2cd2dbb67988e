"""Settings check themselves, name what is wrong, and come back from text exactly as they were."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from megavlm.config import Config, field_docs, option, require
from megavlm.errors import ConfigError, LayoutError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Config):
    """Degrees of parallelism."""

    tensor_model_parallel_size: int = 1
    """Ranks that share the weights
    of each layer."""
    sequence_parallel: bool = False
    pipeline_layout: tuple[int, ...] | None = None
    """Layers of each stage."""
    recompute_granularity: Literal["none", "selective", "full"] = option("none", name="--recompute-granularity")

    def check(self) -> None:
        size = self.tensor_model_parallel_size
        require(size >= 1, self, "tensor_model_parallel_size", "is below 1", "use 1 for no tensor parallelism")


@dataclass(frozen=True, kw_only=True)
class WideParallelConfig(ParallelConfig):
    """Derived settings."""

    context_parallel_size: int = 1
    """Ranks that share a sequence."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig(Config):
    """One source of data."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """What is read."""

    sources: tuple[SourceConfig, ...] = ()
    mix: dict[str, float] = field(default_factory=dict)
    tokenizer: str | None = None
    image_channels: Literal[1, 3] = 3


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """A run."""

    heads: int
    lr: float = 1e-4
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    evaluation: DataConfig | None = None

    def check(self) -> None:
        size = self.parallel.tensor_model_parallel_size
        require(
            self.heads % size == 0,
            self,
            "parallel.tensor_model_parallel_size",
            f"does not divide {self.heads} attention heads",
            "use 1, 2, 4 or 8",
            error=LayoutError,
        )


def full_run() -> RunConfig:
    return RunConfig(
        heads=8,
        lr=3e-05,
        parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_layout=(3, 5)),
        data=DataConfig(
            sources=(SourceConfig(path="a: #b", weight=1e22), SourceConfig(path="1e-4", weight=0.1)),
            mix={"web": 1e-07, "on": 2.0},
            tokenizer="none",
        ),
        evaluation=DataConfig(tokenizer="null"),
    )


def error_of(make: Any, *arguments: Any, **keywords: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        make(*arguments, **keywords)
    return caught.value


def test_plain_data_stands_for_typed_values() -> None:
    run = RunConfig.from_dict({"heads": 4, "lr": 1, "parallel": {"pipeline_layout": [2, 2]}})
    assert run.lr == 1.0 and type(run.lr) is float
    assert run.parallel == ParallelConfig(pipeline_layout=(2, 2))
    assert run.to_dict()["parallel"]["pipeline_layout"] == [2, 2]


@pytest.mark.parametrize(
    ("cls", "name", "value", "kind"),
    [
        (RunConfig, "heads", True, "an integer"),
        (RunConfig, "heads", 2.0, "an integer"),
        (RunConfig, "heads", None, "an integer"),
        (RunConfig, "lr", "1e-4", "a finite number"),
        (RunConfig, "lr", float("nan"), "a finite number"),
        (RunConfig, "lr", float("-inf"), "a finite number"),
        (RunConfig, "lr", 10**400, "a finite number"),
        (RunConfig, "lr", True, "a finite number"),
        (RunConfig, "parallel", 3, "the settings of ParallelConfig"),
        (RunConfig, "parallel", WideParallelConfig(), "the settings of ParallelConfig"),
        (ParallelConfig, "sequence_parallel", 1, "true or false"),
        (ParallelConfig, "pipeline_layout", 3, "a list, each item an integer or null"),
        (ParallelConfig, "recompute_granularity", "some", "one of none, selective, full"),
        (DataConfig, "tokenizer", 7, "text or null"),
        (DataConfig, "image_channels", True, "one of 1, 3"),
        (DataConfig, "mix", [1], "a mapping, each value a finite number"),
    ],
)
def test_wrong_type_names_field_value_and_remedy(cls: type[Config], name: str, value: Any, kind: str) -> None:
    required = {"heads": 8} if cls is RunConfig else {}
    error = error_of(cls, **{**required, name: value})
    assert (error.where, error.problem) == (f"{cls.__name__}.{name}", f"must be {kind}")
    assert error.value is value
    assert error.remedy.startswith(("write ", "use one of ", "give the keys "))


def test_wrong_type_inside_a_list_or_mapping_names_the_item() -> None:
    assert error_of(ParallelConfig, pipeline_layout=(1, "2")).where == "ParallelConfig.pipeline_layout[1]"
    assert error_of(DataConfig, mix={"web": "much"}).where == "mix.web"
    sources = {"sources": [{"path": "a"}, {"path": "b", "weight": "c"}]}
    assert error_of(RunConfig.from_dict, {"heads": 8, "data": sources}).where == "data.sources[1].weight"


def test_a_check_names_class_or_path() -> None:
    alone = error_of(ParallelConfig, tensor_model_parallel_size=0)
    assert str(alone) == ("ParallelConfig.tensor_model_parallel_size = 0: is below 1; use 1 for no tensor parallelism")
    inside = error_of(RunConfig.from_dict, {"heads": 8, "parallel": {"tensor_model_parallel_size": 0}})
    assert inside.where == "parallel.tensor_model_parallel_size"
    across = error_of(RunConfig, heads=8, parallel=ParallelConfig(tensor_model_parallel_size=3))
    assert type(across) is LayoutError
    assert str(across) == (
        "parallel.tensor_model_parallel_size = 3: does not divide 8 attention heads; use 1, 2, 4 or 8"
    )


def test_errors_survive_pickling_after_they_were_moved_to_a_path() -> None:
    error = error_of(RunConfig.from_dict, {"heads": 8, "parallel": {"sequence_parallel": "no"}})
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_unknown_key_names_the_path_and_the_nearest_keys() -> None:
    error = error_of(RunConfig.from_dict, {"heads": 8, "parallel": {"tensor_paralel_size": 2}})
    assert (error.where, error.value, error.problem) == ("parallel.tensor_paralel_size", 2, "unknown key")
    assert error.remedy == "did you mean tensor_model_parallel_size?"
    misplaced = error_of(RunConfig.from_dict, {"heads": 8, "sequence_parallel": True})
    assert misplaced.where == "RunConfig.sequence_parallel"
    assert misplaced.remedy == "did you mean parallel.sequence_parallel?"
    far = error_of(RunConfig.from_dict, {"heads": 8, "zzz": 1})
    assert far.remedy == "the keys here are heads, lr, parallel, data, evaluation"


def test_missing_required_field_is_named() -> None:
    assert "RunConfig.heads = None: is missing and must be an integer; write" in str(error_of(RunConfig.from_dict, {}))
    inside = error_of(RunConfig.from_dict, {"heads": 8, "data": {"sources": [{"weight": 2.0}]}})
    assert inside.where == "data.sources[0].path"


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_round_trip_is_exact(suffix: str, tmp_path: Path) -> None:
    run = full_run()
    path = tmp_path / f"run{suffix}"
    path.write_text(run.to_json() if suffix == ".json" else run.to_yaml())
    assert RunConfig.load(path) == run
    assert RunConfig.from_dict(run.to_dict()) == run


def test_text_keeps_the_order_of_the_fields() -> None:
    assert full_run().to_yaml().startswith("heads: 8\nlr: 3.0e-05\nparallel:\n  tensor_model_parallel_size: 2\n")
    assert full_run().to_json().startswith('{\n  "heads": 8,\n  "lr": 3e-05,\n  "parallel": {\n')


def test_yaml_numbers_without_a_dot_are_numbers_in_float_fields_only() -> None:
    run = RunConfig.from_yaml("heads: 8\nlr: 1e-4\ndata: {mix: {web: 2e5}, tokenizer: 1e-4}\n")
    assert (run.lr, run.data.mix, run.data.tokenizer) == (1e-4, {"web": 2e5}, "1e-4")
    assert error_of(RunConfig.from_yaml, "heads: 8\nlr: fast\n").value == "fast"
    assert error_of(RunConfig.from_yaml, "heads: 8e0\n").value == "8e0"


@pytest.mark.parametrize(
    ("name", "text", "where", "value"),
    [
        ("a.yaml", "heads: 8\nlr: [1\n", ", line 3", ""),
        ("a.yaml", "heads: 8\nlr: a: b\n", ", line 2", "lr: a: b"),
        ("a.yaml", "heads: 8\nlr: \x01\n", ", line 2", "lr: \x01"),
        ("a.json", '{"heads": 8,\n "lr": }', ", line 2", ' "lr": }'),
        ("a.yaml", "heads: 2026-13-45\n", "", "month must be in 1..12"),
        ("a.yaml", "- heads\n", "", ["heads"]),
        ("a.yaml", "", "", None),
    ],
)
def test_bad_syntax_names_file_and_line(name: str, text: str, where: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    error = error_of(RunConfig.load, tmp_path / name)
    assert (error.where, error.value) == (f"{tmp_path / name}{where}", value)
    assert error.problem and error.remedy


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = error_of(RunConfig.load, tmp_path / "none.yaml")
    assert missing.value == str(tmp_path / "none.yaml")
    assert (missing.problem, missing.remedy) == (
        "cannot be read: No such file or directory",
        "check the path and its permissions",
    )
    assert error_of(RunConfig.load, "run.toml").remedy == "use .yaml, .yml or .json"
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    assert error_of(RunConfig.load, tmp_path / "binary.yaml").problem == "is not text"


def test_replace_checks_again() -> None:
    run = full_run()
    assert run.replace(lr=1).lr == 1.0
    assert error_of(run.replace, heads=7).value == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.lr = 2.0  # type: ignore[misc]


def test_override_reads_values_by_the_type_of_the_field() -> None:
    run = full_run().override(
        "lr=1e-3",
        "parallel.sequence_parallel=false",
        "parallel.pipeline_layout=[1, 7]",
        "parallel.recompute_granularity=none",
        "data.tokenizer=7",
        "data.mix={web: 1e-4}",
        "data.image_channels=1",
        "data.sources=[{path: x, weight: 3e0}]",
        "evaluation=none",
    )
    assert run.lr == 1e-3
    assert run.parallel == ParallelConfig(tensor_model_parallel_size=2, pipeline_layout=(1, 7))
    assert run.data == DataConfig(
        sources=(SourceConfig(path="x", weight=3.0),), mix={"web": 1e-4}, tokenizer="7", image_channels=1
    )
    assert run.evaluation is None
    assert run.override("data.tokenizer=none").data.tokenizer is None
    assert run.override("evaluation.tokenizer=b").evaluation == DataConfig(tokenizer="b")


def test_override_reaches_into_a_list_by_number() -> None:
    run = full_run().override(
        "data.sources.1.weight=3e0", "parallel.pipeline_layout=[1, 7]", "parallel.pipeline_layout.0=2"
    )
    first, second = full_run().data.sources
    assert run.data.sources == (first, second.replace(weight=3.0))
    assert run.parallel.pipeline_layout == (2, 7)


def test_override_checks_the_final_state_only() -> None:
    run = full_run().override("heads=6", "parallel.tensor_model_parallel_size=3")
    assert (run.heads, run.parallel.tensor_model_parallel_size) == (6, 3)


@pytest.mark.parametrize(
    ("assignment", "where", "value", "remedy"),
    [
        ("parallel.tensor_paralel_size=2", "parallel.tensor_paralel_size", "2", "parallel.tensor_model_parallel_size"),
        ("parallels.sequence_parallel=1", "parallels.sequence_parallel", "1", "did you mean parallel?"),
        ("hedas=2", "RunConfig.hedas", "2", "did you mean heads?"),
        ("lr.x=2", "lr.x", "2", "shorten the path"),
        ("parallel.pipeline_layout=[1", "parallel.pipeline_layout", "[1", "write [item"),
        ("parallel.sequence_parallel=2", "parallel.sequence_parallel", 2, "write true or false"),
        ("heads=2.5", "RunConfig.heads", "2.5", "write a whole number"),
        ("heads", "the override", "heads", "write section.field=value"),
        ("data.sources.2.weight=1", "data.sources.2.weight", 1.0, "the list has 0 to 1"),
        ("data.sources.1.weights=1", "data.sources.1.weights", "1", "did you mean data.sources.1.weight?"),
        ("data.sources.first.weight=1", "data.sources.first.weight", "1", "write a number behind data.sources"),
    ],
)
def test_wrong_override_is_named(assignment: str, where: str, value: Any, remedy: str) -> None:
    error = error_of(full_run().override, assignment)
    assert (error.where, error.value) == (where, value)
    assert remedy in error.remedy


def test_field_docs_are_read_from_the_source() -> None:
    assert field_docs(WideParallelConfig) == {
        "tensor_model_parallel_size": "Ranks that share the weights\nof each layer.",
        "pipeline_layout": "Layers of each stage.",
        "context_parallel_size": "Ranks that share a sequence.",
    }


@dataclass(frozen=True, kw_only=True)
class HidingConfig(Config):
    load: str = ""  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class UnsupportedConfig(Config):
    path: Path = Path()


def test_a_class_that_cannot_work_is_our_own_error() -> None:
    with pytest.raises(AssertionError, match="HidingConfig.load hides a method"):
        HidingConfig()
    with pytest.raises(AssertionError, match="UnsupportedConfig.path: settings cannot be"):
        UnsupportedConfig()
