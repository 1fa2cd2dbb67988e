"""Command lines become settings, or one error that names what the user typed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from megavlm.config import Config, option, require
from megavlm.errors import ConfigError
from megavlm.options import parse_options


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Config):
    """Degrees of parallelism.

    More words."""

    tensor_model_parallel_size: int = 1
    """Ranks that share the weights of each layer."""
    sequence_parallel: bool = False
    """Split the norms' activations."""
    pipeline_layout: tuple[int, ...] | None = None
    """Layers of each stage."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """The optimizer."""

    learning_rate: float = option(1e-4, name="--lr")
    """Peak learning rate."""
    kind: Literal["adam", "sgd"] = "adam"
    decays: tuple[float, ...] = (0.5, 2.0)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """What is read."""

    data_path: tuple[str, ...] = ()
    tokenizer: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """A run."""

    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    num_attention_heads: int = 8
    """Heads of each layer."""
    data: DataConfig | None = None

    def check(self) -> None:
        size = self.parallel.tensor_model_parallel_size
        problem = f"does not divide {self.num_attention_heads} attention heads"
        divides = self.num_attention_heads % size == 0
        require(divides, self, "parallel.tensor_model_parallel_size", problem, "use 1, 2, 4 or 8")


def parse(*argv: str) -> RunConfig:
    return parse_options(RunConfig(), argv)


def error_of(*argv: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    return caught.value


@pytest.mark.parametrize(
    ("argv", "override"),
    [
        ("--tensor-model-parallel-size 2", "parallel.tensor_model_parallel_size=2"),
        ("--tensor-model-parallel-size=2", "parallel.tensor_model_parallel_size=2"),
        ("parallel.tensor_model_parallel_size=2", "parallel.tensor_model_parallel_size=2"),
        ("--sequence-parallel", "parallel.sequence_parallel=true"),
        ("--pipeline-layout 1 2 3", "parallel.pipeline_layout=[1, 2, 3]"),
        ("--pipeline-layout", "parallel.pipeline_layout=[]"),
        ("--pipeline-layout=-4", "parallel.pipeline_layout=[-4]"),
        ("--lr 1e-3", "optimizer.learning_rate=0.001"),
        ("--lr -1", "optimizer.learning_rate=-1.0"),
        ("--kind sgd", "optimizer.kind=sgd"),
        ("--decays 1 2e-1", "optimizer.decays=[1.0, 0.2]"),
        ("--tokenizer=a=b", "data.tokenizer=a=b"),
        ("--num-attention-heads 16", "num_attention_heads=16"),
    ],
)
def test_spellings_of_one_setting(argv: str, override: str) -> None:
    changed = RunConfig().override(override)
    assert changed != RunConfig()
    assert parse(*argv.split()) == changed


def test_negations_and_none_undo_what_the_config_says() -> None:
    config = RunConfig().override(
        "parallel.sequence_parallel=true", "parallel.pipeline_layout=[4, 4]", "data.tokenizer=x"
    )
    changed = parse_options(config, ["--no-sequence-parallel", "--pipeline-layout", "none", "--tokenizer", "none"])
    assert changed == RunConfig(data=DataConfig())


def test_list_values_end_at_the_next_option_or_override() -> None:
    run = parse("--data-path", "a", "s3://b?c=d", "parallel.sequence_parallel=true", "--decays", "1", "--lr", "2")
    assert run.data == DataConfig(data_path=("a", "s3://b?c=d"))
    assert (run.parallel.sequence_parallel, run.optimizer.decays, run.optimizer.learning_rate) == (True, (1.0,), 2.0)


def test_the_last_of_several_wins_whatever_its_spelling() -> None:
    assert parse("--lr", "1", "optimizer.learning_rate=2").optimizer.learning_rate == 2.0
    assert parse("optimizer.learning_rate=2", "--lr", "1").optimizer.learning_rate == 1.0
    assert parse("--sequence-parallel", "--no-sequence-parallel").parallel.sequence_parallel is False
    assert parse("--kind=sgd", "--lr=3", "optimizer={kind: sgd}", "--kind=adam") == RunConfig()


def test_checks_see_the_final_state_only() -> None:
    run = parse("--tensor-model-parallel-size", "3", "--num-attention-heads", "6")
    assert (run.parallel.tensor_model_parallel_size, run.num_attention_heads) == (3, 6)


def test_unknown_option_is_named_with_the_nearest() -> None:
    assert str(error_of("--tensor-paralel-size", "2")) == (
        "--tensor-paralel-size = '2': unknown option; did you mean --tensor-model-parallel-size? `--help` lists all"
    )
    assert error_of("--zzz=3").remedy == "`--help` lists all"
    assert "--no-sequence-parallel" in error_of("--no-sequence-paralel").remedy


def test_abbreviations_are_unknown() -> None:
    error = error_of("--tensor-model-parallel", "2")
    assert (error.where, error.value, error.problem) == ("--tensor-model-parallel", "2", "unknown option")


@pytest.mark.parametrize(
    ("argv", "where", "value", "remedy"),
    [
        (["--lr", "fast"], "--lr", "fast", "write a number such as 0.1 or 1e-4"),
        (["--lr", "nan"], "--lr", None, "write a number such as 0.1 or 1e-4"),
        (["--lr"], "--lr", "", "write --lr FLOAT"),
        (["--lr", "--kind", "sgd"], "--lr", "", "write --lr FLOAT"),
        (["--kind=adamw"], "--kind", "adamw", "use one of adam, sgd"),
        (["--tensor-model-parallel-size", "2.5"], "--tensor-model-parallel-size", "2.5", "write a whole number"),
        (["--tensor-model-parallel-size", "3"], "--tensor-model-parallel-size", 3, "use 1, 2, 4 or 8"),
        (["--num-attention-heads", "x"], "--num-attention-heads", "x", "write a whole number"),
        (["--pipeline-layout", "1", "a"], "--pipeline-layout[1]", "a", "write a whole number"),
        (["--sequence-parallel=true"], "--sequence-parallel", "true", "use --sequence-parallel or --no-sequence"),
        (["optimizer.kind=x"], "optimizer.kind", "x", "use one of adam, sgd"),
        (["optimizer.knd=x"], "optimizer.knd", "x", "did you mean optimizer.kind?"),
        (["train"], "the command line", "train", "options start with --, overrides are section.field=value"),
        (["-x"], "-x", "", "`--help` lists all"),
    ],
)
def test_one_error_names_what_was_typed(argv: list[str], where: str, value: Any, remedy: str) -> None:
    error = error_of(*argv)
    assert error.where == where
    assert value is None or error.value == value
    assert remedy in error.remedy


def test_an_error_about_something_not_typed_keeps_its_path() -> None:
    config = RunConfig().override("parallel.tensor_model_parallel_size=2")
    with pytest.raises(ConfigError, match=r"^parallel\.tensor_model_parallel_size = 2: does not divide 7") as caught:
        parse_options(config, ["--num-attention-heads", "7"])
    assert caught.value.remedy == "use 1, 2, 4 or 8"


def test_help_lists_every_option_with_its_doc_and_current_value(capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig().override("parallel.pipeline_layout=[3, 5]", "optimizer.learning_rate=0.25")
    with pytest.raises(SystemExit) as stopped:
        parse_options(config, ["--lr", "fast", "--help"], prog="megavlm plan")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: megavlm plan ")
    titles = [
        "RunConfig: A run.",
        "parallel: Degrees of parallelism.",
        "optimizer: The optimizer.",
        "data: What is read.",
    ]
    assert [line for line in text.splitlines()[1:] if line in titles] == titles
    for line in (
        "  --num-attention-heads INT (default: 8)\n      Heads of each layer.\n",
        "  --sequence-parallel, --no-sequence-parallel (default: False)\n      Split the norms' activations.\n",
        "  --pipeline-layout INT ...|none (default: 3 5)\n      Layers of each stage.\n",
        "  --lr FLOAT (default: 0.25)\n      Peak learning rate.\n",
        "  --kind {adam,sgd} (default: adam)\n",
        "  --tokenizer TEXT|none (default: none, as its section)\n",
    ):
        assert line in text


@dataclass(frozen=True, kw_only=True)
class CollidingConfig(Config):
    parallel: ParallelConfig = ParallelConfig()
    no_sequence_parallel: int = 0


def test_two_fields_with_one_option_are_our_own_error() -> None:
    with pytest.raises(AssertionError, match=r"parallel\.sequence_parallel and no_sequence_parallel"):
        parse_options(CollidingConfig(), [])


@dataclass(frozen=True, kw_only=True)
class OneFamily(Config):
    """A model of one kind."""

    image_token: int = 1


@dataclass(frozen=True, kw_only=True)
class OtherFamily(Config):
    """A model of another kind."""

    image_token: int = 2
    video_token: int = 3


@dataclass(frozen=True, kw_only=True)
class FamiliesConfig(Config):
    """A run whose model is of one family."""

    one: OneFamily | None = None
    other: OtherFamily | None = OtherFamily()


def test_what_two_families_share_is_set_by_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    changed = parse_options(FamiliesConfig(), ["other.image_token=7", "--video-token", "8"])
    assert changed.other == OtherFamily(image_token=7, video_token=8)
    with pytest.raises(ConfigError, match="--image-token = '7': unknown option"):
        parse_options(FamiliesConfig(), ["--image-token", "7"])
    with pytest.raises(SystemExit):
        parse_options(FamiliesConfig(), ["--help"])
    shown = capsys.readouterr().out
    assert "  other.image_token=INT (default: 2)" in shown and "  --video-token INT (default: 3)" in shown
    assert "--image-token" not in shown
