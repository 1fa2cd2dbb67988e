"""Options for all stages and for one."""

from __future__ import annotations

import pytest

from megavlm.cli import main
from megavlm.curriculum.options import chosen_stages, parse_stage_options
from megavlm.curriculum.stages import with_folders
from megavlm.errors import ConfigError
from megavlm.recipes import RECIPES, recipe, stages_of

RUNS = {stage: recipe(f"aquila-vl-tiny/{stage}") for stage in stages_of("aquila-vl-tiny")}


def steps(*words: str) -> list[int]:
    return [run.train.train_iters for run in parse_stage_options(RUNS, words, "megavlm train").values()]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--train-iters", "7"], [7, 7, 7, 7, 7, 7]),
        (["2a:--train-iters=3", "--train-iters", "7"], [7, 3, 7, 7, 7, 7]),
        (["--train-iters=7", "2a:--train-iters", "3", "--seed", "5"], [7, 3, 7, 7, 7, 7]),
        (["4:train.train_iters=9", "train.train_iters=7", "1:train.train_iters=2"], [2, 7, 7, 7, 7, 9]),
        (["2b:--train-iters", "3", "2b:--trainable", "decoder", "newline", "--train-iters", "8"], [8, 8, 3, 8, 8, 8]),
    ],
)
def test_what_is_written_for_one_stage_wins(words: list[str], expected: list[int]) -> None:
    assert steps(*words) == expected


def test_values_go_with_their_option() -> None:
    runs = parse_stage_options(RUNS, ["2b:--trainable", "decoder", "newline", "--seed", "8"], "megavlm train")
    assert runs["2b"].trainable == ("decoder", "newline")
    assert runs["3"].trainable == RUNS["3"].trainable
    assert {run.train.seed for run in runs.values()} == {8}
    (data,) = {run.data and run.data.path for run in parse_stage_options(RUNS, ["--data-path", "C:d"], "x").values()}
    assert data == "C:d"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["2d:--train-iters=3"], "'2d' is no stage of this model; the stages are 1, 2a"),
        (["2a:--train-itres=3"], "2a: --train-itres = '3': unknown option; did you mean --train-iters"),
        (["2a:--lr=-1"], "2a: --lr"),
        (["--tower-lr", "1e-5"], "1: --tower-lr"),  # that stage's tower is frozen
    ],
)
def test_mistakes_name_the_stage(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        steps(*words)
    assert message in str(error.value)


def test_chosen_stages_keep_their_order() -> None:
    assert chosen_stages("3, 2a", list(RUNS)) == ["2a", "3"]
    assert chosen_stages(None, list(RUNS)) == list(RUNS)
    for text, message in (("2d", "is no stage of this model"), (" ,", "names no stage")):
        with pytest.raises(ConfigError, match=message):
            chosen_stages(text, list(RUNS))


def test_every_model_has_its_stages(capsys: pytest.CaptureFixture[str]) -> None:
    models = {name.partition("/")[0] for name in RECIPES if "/" in name}
    found = {f"{model}/{stage}" for model in models for stage in stages_of(model)}
    assert {name for name in RECIPES if "/" in name} - found == {name for name in RECIPES if name.endswith("-card")}
    assert stages_of("infimm-tiny") == ["pretrain", "multitask", "finetune"]
    assert stages_of("decoder-tiny") == stages_of("infimm") == []
    assert main(["recipes", "infimm-tiny", "finetune:--train-iters=3"]) == 0
    assert capsys.readouterr().out.count("\n---\n") == 2
    assert main(["recipes", "infimm-tiny/finetune"]) == 0
    steps_of_stage = recipe("infimm-tiny/finetune").train.train_iters
    assert f"train_iters: {steps_of_stage}\n" in capsys.readouterr().out


def test_stages_share_no_folder_and_no_log() -> None:
    words = ["--save", "s", "--export-hf", "e", "--log-json", "logs/run.jsonl", "--tensorboard-dir", "t"]
    runs = parse_stage_options(RUNS, words, "megavlm train")
    run = with_folders("2a", runs["2a"])
    assert (run.checkpoint.save_to, run.weights.export_hf) == ("s/2a", "e/2a")
    assert (run.log.log_json, run.log.tensorboard_dir, run.log.profile_dir) == ("logs/run-2a.jsonl", "t/2a", None)
