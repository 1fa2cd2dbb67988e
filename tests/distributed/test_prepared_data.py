"""Training on prepared data: the same steps and ledger under every layout, and nothing read twice."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from aquila_folders import tiny_model
from prepared_toys import data_config, prepare_toys, stream
from qwen_hf import write_tokenizer
from tiny_aquila import GRIDS
from tiny_folders import infimm_folder

from megavlm.batch import AttendedMedia
from megavlm.build.from_folder import run_from_folder
from megavlm.build.held_out import held_out_data
from megavlm.build.loader import build_words
from megavlm.build.model import build_model
from megavlm.build.run_config import (
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    SourceConfig,
    check_for_world,
)
from megavlm.cli import main
from megavlm.data.chat import ChatConfig
from megavlm.data.ledger import check_ledger
from megavlm.data.order import StepOrder
from megavlm.data.read import ShardReader
from megavlm.data.sample import Sample, Turn
from megavlm.data.shards import write_shards
from megavlm.data.step_plan import Planner, open_sources
from megavlm.data.token_counts import add_token_counts
from megavlm.data.toy_world.samples import toy_samples
from megavlm.data.toy_world.world import SampleKind, ToyWorld
from megavlm.errors import DataError
from megavlm.parallel import groups as process_groups
from megavlm.parallel.schedule import forward_loss
from megavlm.testing import RankFailed, assert_losses_close, spawn
from megavlm.train.evaluation import Evaluation
from megavlm.train.feed import feed
from megavlm.train.stopping import Stopping
from megavlm.train.training import build_training

GOLDEN = Path(__file__).parents[1] / "fixtures" / "infimm_zephyr_tiny"
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
AQUILA_KINDS: tuple[SampleKind, ...] = ("chat", "multi_image", "text")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of both families, and data sets with the token counts of both."""
    root = tmp_path_factory.mktemp("world")
    tiny_model(root / "aquila", tied=True, grid=GRIDS["2a"])
    write_tokenizer(root / "aquila")
    infimm_folder(GOLDEN, root / "infimm")
    toys = ToyWorld(sizes=((64, 64), (160, 64)))
    prepare_toys(root / "data", root / "aquila", ChatConfig(), {"chat": 30, "multi_image": 12, "text": 20}, toys)
    prepare_toys(root / "pairs", root / "infimm", ChatConfig(template="vicuna"), {"pairs": 25, "documents": 9}, toys)
    for data, kinds in (("data", ("chat", "text")), ("pairs", ("pairs", "documents"))):
        for kind in kinds:  # of multi_image nothing is held out
            shutil.copytree(root / data / kind, root / "held out" / kind)
    return root


def aquila_run(world: str, degrees: dict[str, Any], **changes: Any) -> RunConfig:
    root = Path(world)
    data = data_config(root / "data", root / "aquila", ChatConfig(), [stream(AQUILA_KINDS, 12)])
    return small_run(root / "aquila", data, degrees).replace(**changes)


def infimm_run(world: str, degrees: dict[str, Any], **changes: Any) -> RunConfig:
    """Two streams, cut to short texts; of most documents the tags of the last pictures are gone."""
    root = Path(world)
    pairs = stream(["pairs"], 8, name="pairs", tokens_per_sample=40, over_long="cut", loss_weight=0.5)
    documents = stream(["documents"], 4, name="documents", tokens_per_sample=100, over_long="cut")
    data = data_config(root / "pairs", root / "infimm", ChatConfig(template="vicuna"), [pairs, documents])
    run = small_run(root / "infimm", data, degrees)
    return run.replace(trainable=("cross_attention", "resampler"), **changes)


def small_run(folder: Path, data: DataConfig, degrees: dict[str, Any]) -> RunConfig:
    run = run_from_folder(folder)
    return run.replace(
        data=data,
        parallel=ParallelConfig(**degrees),
        precision=PrecisionConfig(params_dtype="float32"),
        optimizer=OptimizerConfig(lr=1e-3, lr_warmup_iters=0),
        make_vocab_size_divisible_by=2,
        train=run.train.replace(train_iters=100),
    )


RUNS = {"aquila": aquila_run, "infimm": infimm_run}


def train(family: str, world: str, degrees: dict[str, Any], steps: int, ledger: str | None) -> Any:
    """(losses, gradient norm, target tokens) of each step on the rank that speaks; losses of an evaluation; bytes of
    pictures read by each."""
    world_size = process_groups.join()
    run = RUNS[family](world, degrees)
    assert run.data is not None
    data = run.data.replace(valid_path=f"{world}/held out")
    run = run.replace(data=data, train=run.train.replace(train_iters=steps, eval_interval=100, eval_iters=2))
    check_for_world(run, world_size)
    groups = process_groups.start(run.parallel)
    read = count_picture_bytes()
    training = build_training(run, groups)
    training.scheduler.step(increment=1)
    found = []
    for step in feed(run, training.model, groups, 0, Path(ledger) if ledger else None):
        result = training.step(step, stop=0)
        found.append((result.losses, result.grad_norm, result.target_tokens))
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, (groups.pipeline_rank, groups.data_rank, sum(read)))
    evaluated, _ = Evaluation(training, Stopping(run.train, groups)).after_step(steps)
    return (found, everyone, evaluated) if groups.speaks else None


def count_picture_bytes() -> list[int]:
    """The sizes of all picture files that this process reads from now on."""
    sizes: list[int] = []
    plain = ShardReader.read_pictures

    def counting(self: ShardReader, *arguments: Any) -> list[bytes]:
        files = plain(self, *arguments)
        sizes.extend(map(len, files))
        return files

    ShardReader.read_pictures = counting  # type: ignore[method-assign, assignment]
    return sizes


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP=2": (2, {}),
    "DP=4": (4, {}),
    "TP=2 with SP": (2, TP2_SP),
    "PP=2": (2, PP2),
    "TP=2 x PP=2 with SP": (4, {**TP2_SP, **PP2}),
    "DP=2 x PP=2": (4, PP2),
}


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process computes, and its ledger."""
    root = tmp_path_factory.mktemp("alone")
    found = {}
    for family in RUNS:
        (result,) = spawn(train, 1, family, str(world), {}, 5, f"{root}/{family}")
        found[family] = (result[0], root / family, sum(read for *_, read in result[1]), result[2])
    return found


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[pytest.mark.full] if name in ("DP=4", "DP=2 x PP=2") else []) for name in LAYOUTS],
)
@pytest.mark.parametrize("family", RUNS)
def test_steps_and_ledger_are_alike(
    family: str, layout: str, world: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    world_size, degrees = LAYOUTS[layout]
    expected, ledger, all_bytes, evaluated = alone[family]
    (result,) = filter(None, spawn(train, world_size, family, str(world), degrees, 5, f"{tmp_path}/ledger"))
    for (losses, norm, tokens), (expected_losses, expected_norm, count) in zip(result[0], expected, strict=True):
        assert_same_losses(losses, expected_losses)
        assert_losses_close(norm, expected_norm, tolerance=1e-4)
        assert tokens == count
    assert_same_losses(result[2], evaluated)
    order = order_of(family, world)
    for folder in (ledger, tmp_path / "ledger"):
        report = check_ledger(folder, order)
        assert (report.steps, report.samples, report.wrong) == (5, 60, [])
    read = [read for *_, read in result[1]]
    assert sum(read) == all_bytes, "each picture file is read by one rank alone"
    assert all(read == 0 for stage, _, read in result[1] if stage > 0), "no later stage reads a picture"


def assert_same_losses(mine: dict[str, float], expected: dict[str, float]) -> None:
    assert mine.keys() == expected.keys()
    for name, loss in expected.items():
        assert_losses_close(mine[name], loss)


def test_losses_of_sources_are_means_over_their_own_tokens(world: Path, alone: dict[str, Any]) -> None:
    """Of the first step, whose weights are the folder's: each is the loss of a batch in which no other one counts."""
    for family, names in (("aquila", ["chat", "multi_image", "text"]), ("infimm", ["pairs", "documents"])):
        losses, expected = alone[family][0][0][0], spawn(losses_one_by_one, 1, family, str(world))[0]
        assert list(losses) == ["lm loss", *(f"lm loss/{name}" for name in names)]
        for name, loss in zip(names, expected, strict=True):
            assert_losses_close(losses[f"lm loss/{name}"], loss)


def losses_one_by_one(family: str, world: str) -> list[float]:
    process_groups.join()
    run = RUNS[family](world, {})
    groups = process_groups.start(run.parallel)
    training = build_training(run, groups)
    step = next(feed(run, training.model, groups, 0))
    assert step.sources is not None
    named = {name for row in step.rows for name in row}
    assert len(named) > 8 and named <= set(step.samples()) and len(step.samples()) == 12
    found = []
    for number in range(len(step.sources.names)):
        batches = [
            replace(batch, loss_weights=(of_tokens == number).float())
            for batch, of_tokens in zip(step.batches, step.sources.of_tokens, strict=True)
        ]
        found.append(forward_loss(training.chunks, batches, groups, training.model.inputs).loss)
    return found


def test_held_out_data_are_read_in_an_order_of_their_own(world: Path, alone: dict[str, Any]) -> None:
    assert list(alone["aquila"][3]) == ["lm loss", "lm loss/chat", "lm loss/text"]
    assert list(alone["infimm"][3]) == ["lm loss", "lm loss/pairs", "lm loss/documents"]
    run = aquila_run(str(world), {})
    assert run.data is not None
    epochs = [SourceConfig(name="chat", epochs=0.5, part=1, parts=3), SourceConfig(name="text", epochs=2)]
    trained = stream(["chat"], 12).replace(sources=tuple(epochs))
    (found,) = held_out_data(run.data.replace(streams=(trained,), valid_path=f"{world}/held out")).streams
    assert [(one.name, one.weight, one.parts) for one in found.sources] == [("chat", 15.0, 1), ("text", 40.0, 1)]
    with pytest.raises(DataError, match="prepare held-out data below it, of: chat, multi_image, text"):
        held_out_data(run.data.replace(valid_path=str(world)))


def order_of(family: str, world: Path) -> StepOrder:
    run = RUNS[family](str(world), {})
    assert run.data is not None
    sources = open_sources(run.data, build_words(run))
    return StepOrder(run.data.streams, {source.name: len(source.index) for source in sources}, run.train.seed)


def test_two_streams_weigh_what_they_say(alone: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in (alone["infimm"][1] / "rank-00000.jsonl").read_text().splitlines()]
    assert {what for line in lines for what in line["counted"]} == {"cut"} and not any(
        "notes" in line for line in lines
    )


def test_documents_are_cut_before_their_last_pictures(world: Path) -> None:
    """Which the text sees no longer: it is as if they came last, and nothing of the sample is damaged."""
    run = infimm_run(str(world), {})
    assert run.data is not None and run.infimm is not None
    words = build_words(run)
    sources = open_sources(run.data, words)
    documents = next(source for source in sources if source.name == "documents")
    seen = {}
    for number in range(len(documents.index)):
        pictures = documents.index.pictures(np.array([number]))
        sample = documents.reader.read_text(number)
        whole, cut = (words.document(sample, pictures, 0, most) for most in (10**6, 100))
        assert cut.pictures == whole.pictures and np.array_equal(cut.tokens, whole.tokens[:100])
        row = words.batch([cut, whole], 1000, torch.zeros(0, 3), ())
        assert isinstance(row.media, AttendedMedia)
        of_cut, of_whole = row.media.image_of_token[0, :100], row.media.image_of_token[0, 100 : 100 + len(whole.tokens)]
        first = len(cut.pictures)
        assert torch.equal(of_cut, torch.where(of_whole[:100] < 0, -1, of_whole[:100] - first))
        seen[number] = int((cut.tokens == run.infimm.image_token_id).sum()), first
    assert sum(tags < pictures for tags, pictures in seen.values()) >= 4, seen


def test_samples_that_cannot_be_cut_are_left_out_and_not_damaged(world: Path, tmp_path: Path) -> None:
    """Their last image stands behind the cut, which the sizes of images alone do not tell."""
    run = aquila_run(str(world), {})
    assert run.data is not None
    words = build_words(run)
    plain = list(toy_samples("chat", "train", 0, 12, ToyWorld()))
    before = Turn("user", "so many words " * 20), Turn("assistant", "Yes.")
    late = [Sample(f"late-{number}", one.pictures, (*before, *one.turns)) for number, one in enumerate(plain)]
    write_shards([[*plain, *late]], tmp_path / "data" / "chat")
    add_token_counts(tmp_path / "data" / "chat", words.count, words.name, words.hash)
    (loss,) = spawn(late_steps, 1, str(world), str(tmp_path))
    assert loss > 0
    (line, *_) = (json.loads(text) for text in (tmp_path / "ledger" / "rank-00000.jsonl").read_text().splitlines())
    problems = [note["problem"] for note in line["notes"] if note["problem"] != "cut"]
    assert problems and all(re.match("left out: sample late-.*images and videos need", one) for one in problems)


def late_steps(world: str, root: str) -> float:
    """Damaged samples would stop this run in its first step."""
    process_groups.join()
    run = aquila_run(world, {})
    assert run.data is not None
    data = run.data.replace(
        path=f"{root}/data",
        streams=(stream(["chat"], 12, tokens_per_sample=150, over_long="cut"),),
        most_damaged=0.01,
        full_ledger=True,
    )
    run = run.replace(data=data, train=run.train.replace(train_iters=2))
    groups = process_groups.start(run.parallel)
    training = build_training(run, groups)
    return [training.step(step, stop=0).loss for step in feed(run, training.model, groups, 0, Path(root, "ledger"))][-1]


def damage_one_picture(world: Path, target: Path) -> str:
    """A copy of the data in which one picture of the first step has a flipped bit."""
    shutil.copytree(world, target)
    run = aquila_run(str(world), {})
    assert run.data is not None
    words = build_words(run)
    sources = open_sources(run.data, words)
    plan = Planner(run.data, sources, words, run.train.seed).plan(0)
    place = next(n for n, source in enumerate(plan.samples.source) if sources[int(source)].name == "chat")
    source = sources[int(plan.samples.source[place])]
    rows = source.index.rows([int(plan.samples.index[place])])
    shard = target / "data" / source.name / source.index.shard_names[int(rows.shard[0])]
    content = bytearray(shard.read_bytes())
    content[int(rows.files.offset[0]) + int(rows.files.size[0]) // 2] ^= 1
    shard.write_bytes(bytes(content))
    return f"{target}"


@pytest.mark.parametrize("layout", ["TP=2 x PP=2 with SP", "PP=2"])
def test_damage_that_one_rank_sees_is_known_to_all(layout: str, world: Path, tmp_path: Path) -> None:
    """The last stage, which weighs the tokens, reads no picture: the loss is that of one process all the same."""
    broken = damage_one_picture(world, tmp_path / "broken")
    (alone,) = spawn(train, 1, "aquila", broken, {}, 1, f"{tmp_path}/alone")
    (whole,) = spawn(train, 1, "aquila", str(world), {}, 1, None)
    world_size, degrees = LAYOUTS[layout]
    (found,) = filter(None, spawn(train, world_size, "aquila", broken, degrees, 1, f"{tmp_path}/ledger"))
    assert found[0][0][2] == alone[0][0][2] < whole[0][0][2]
    assert_same_losses(found[0][0][0], alone[0][0][0])
    (line,) = (json.loads(line) for line in (tmp_path / "ledger" / "rank-00000.jsonl").read_text().splitlines())
    assert "checksum" in line["notes"][0]["problem"]
    assert check_ledger(tmp_path / "ledger", order_of("aquila", world)).damaged == 1


def test_too_much_damage_stops_the_run(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "broken")
    (tmp_path / "broken" / "data" / "chat" / "shard-00000.tar").unlink()
    with pytest.raises(RankFailed) as failed:
        spawn(train, 2, "aquila", str(tmp_path / "broken"), {}, 3, None)
    assert isinstance(failed.value.error, DataError) and "megavlm data lint" in str(failed.value.error)
    assert failed.value.error.printed_by_rank == 0, "all ranks have counted the same"


def resume_with_another_seed(world: str, ledger: str) -> tuple[str, int | None]:
    process_groups.join()
    run = aquila_run(world, TP2_SP)
    groups = process_groups.start(run.parallel)
    with pytest.raises(DataError) as refused:
        next(feed(run.replace(train=run.train.replace(seed=77)), build_model(run, groups), groups, 0, Path(ledger)))
    return str(refused.value), refused.value.printed_by_rank


def test_other_data_settings_are_refused_by_all_ranks_at_once(world: Path, tmp_path: Path) -> None:
    """Though but one of them writes the ledger."""
    spawn(resume, 2, str(world), str(tmp_path), 0, 1, TP2_SP)
    (line, printed), *others = spawn(resume_with_another_seed, 2, str(world), str(tmp_path))
    assert "is of a run with other data settings" in line and printed == 0
    assert others == [(line, printed)]


def resume(world: str, ledger: str, first: int, steps: int, degrees: dict[str, Any]) -> None:
    """Only reads: a run that was stopped, and began again at a step before the one it had reached."""
    process_groups.join()
    run = aquila_run(world, degrees)
    run = run.replace(train=run.train.replace(train_iters=steps))
    groups = process_groups.start(run.parallel)
    model = build_model(run, groups)
    for _ in feed(run, model, groups, first, Path(ledger)):
        pass


def test_a_chain_of_resumes_leaves_the_ledger_of_an_unbroken_run(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With other numbers of ranks each time, back over steps that were done, and a line broken off."""
    ledger = tmp_path / "ledger"
    for ranks, first, steps in ((1, 0, 4), (4, 3, 7), (2, 6, 8)):
        spawn(resume, ranks, str(world), str(ledger), first, steps, {})
    order = order_of("aquila", world)
    report = check_ledger(ledger, order)
    assert (report.steps, report.samples, report.wrong) == (8, 96, [])
    with (ledger / "rank-00000.jsonl").open("a") as file:
        file.write('{"step": 8, "sam')
    assert check_ledger(ledger, order).wrong == ["rank-00000.jsonl, line 9: broken off, or none of a ledger"]
    spawn(resume, 1, str(world), str(ledger), 8, 9, {})
    report = check_ledger(ledger, order)
    assert (report.steps, report.wrong) == (9, [])
    assert len(list(ledger.glob("set-aside-*"))) == 1 + 4 + 1
    lines = (ledger / "rank-00001.jsonl").read_text().splitlines(keepends=True)
    for bad, problem in ((lines[1:], "samples, and the order has"), ([*lines, lines[0]], "samples, and the order has")):
        (ledger / "rank-00001.jsonl").write_text("".join(bad))
        assert problem in check_ledger(ledger, order).wrong[0]
    (ledger / "rank-00001.jsonl").write_text("".join(lines))
    assert main(["data", "ledger", str(ledger)]) == 0
    assert "9 steps, 108 samples, 0 damaged, 0 cut or left out: nothing lost" in capsys.readouterr().out
    assert main(["data", "ledger", str(ledger), "--data-path", str(tmp_path)]) == 2
    (ledger / "rank-00000.jsonl").unlink()
    assert main(["data", "ledger", str(ledger)]) == 1 and "do not hold" in capsys.readouterr().out
