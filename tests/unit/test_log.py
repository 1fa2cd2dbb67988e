"""The log: which rank says what where, and lines that readers of Megatron's logs understand."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime

import pytest

from megavlm.log import IterationStats, get_logger, iteration_line, log_iteration, setup_logging, validation_line

STATS = IterationStats(
    iteration=10,
    train_iters=100,
    consumed_samples=320,
    elapsed_time_per_iteration_ms=123.44,
    learning_rate=1e-4,
    global_batch_size=32,
    losses={"lm loss": 2.345678},
    grad_norm=1.2341,
)


@pytest.fixture(autouse=True)
def unchanged_logging() -> Iterator[None]:
    root = logging.getLogger("megavlm")
    before = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.level, root.propagate = before


def test_iteration_line_is_megatrons_to_the_space() -> None:
    assert iteration_line(STATS, datetime(2026, 11, 20, 18, 0, 0)) == (
        " [2026-11-20 18:00:00] iteration       10/     100 | consumed samples:          320 | "
        "elapsed time per iteration (ms): 123.4 | learning rate: 1.000000E-04 | global batch size:    32 | "
        "lm loss: 2.345678E+00 | loss scale: 1.0 | grad norm: 1.234 | number of skipped iterations:   0 | "
        "number of nan iterations:   0 |"
    )


def test_validation_line_is_megatrons_to_the_space() -> None:
    assert validation_line(300, {"lm loss": 2.345678, "lm loss/chat": 30.0}) == (
        " validation loss at iteration 300 | lm loss value: 2.345678E+00 | lm loss PPL: 1.044035E+01 | "
        "lm loss/chat value: 3.000000E+01 | lm loss/chat PPL: 4.851652E+08 | "
    )


@pytest.mark.parametrize(
    ("pattern", "groups"),
    [
        (r"iteration\s+(\d+)/\s*(\d+)", ("10", "100")),
        (r"^ \[(\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2})\] iteration", ("2026-11-20 18:00:00",)),
        (r"consumed samples:\s+(\d+) \|", ("320",)),
        (r"elapsed time per iteration \(ms\): ([\d.]+) \|", ("123.4",)),
        (r"learning rate: ([\d.E+-]+) \|", ("1.000000E-04",)),
        (r"global batch size:\s+(\d+) \|", ("32",)),
        (r"lm loss: (\d+\.\d+E[+-]\d+)", ("2.345678E+00",)),
        (r"image loss: ([\d.E+-]+) \|", ("5.000000E-01",)),
        (r"grad norm: ([\d.]+) \|", ("1.234",)),
        (r"number of skipped iterations:\s+(\d+) \|", ("3",)),
        (r"number of nan iterations:\s+(\d+) \|$", ("4",)),
        (r"iteration +(\d+)/.*\(ms\): ([\d.]+).*lm loss: ([\d.E+-]+).*grad norm: ([\d.]+)",
         ("10", "123.4", "2.345678E+00", "1.234")),
    ],
)  # fmt: skip
def test_the_expressions_people_use_on_megatron_logs_match(pattern: str, groups: tuple[str, ...]) -> None:
    stats = replace(STATS, losses={"lm loss": 2.345678, "image loss": 0.5}, skipped_iterations=3, nan_iterations=4)
    found = re.search(pattern, iteration_line(stats, datetime(2026, 11, 20, 18, 0, 0)))
    assert found is not None
    assert found.groups() == groups


def test_a_loss_that_is_not_a_number_is_still_printed() -> None:
    assert "| lm loss: NAN |" in iteration_line(replace(STATS, losses={"lm loss": float("nan")}), datetime.now())


def test_rank_0_prints_info_plainly_and_warnings_with_its_rank(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=0, world_size=2)
    get_logger("megavlm.train.loop").info("saving to %s", "runs/a")
    get_logger("megavlm.train.loop").debug("unseen")
    get_logger("__main__").warning("slow disk")
    streams = capsys.readouterr()
    assert streams.out == "saving to runs/a\n"
    assert streams.err == "[rank 0] WARNING megavlm.__main__: slow disk\n"


def test_other_ranks_print_warnings_and_errors_only(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=3, world_size=4, level=logging.DEBUG)
    logger = get_logger("megavlm.data")
    logger.debug("unseen")
    logger.info("unseen")
    logger.warning("damaged sample")
    logger.error("no samples left")
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err == (
        "[rank 3] WARNING megavlm.data: damaged sample\n[rank 3] ERROR megavlm.data: no samples left\n"
    )


@pytest.mark.parametrize("rank", [0, 3])
def test_the_iteration_is_printed_by_whichever_rank_calls(rank: int, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=rank, world_size=4)
    log_iteration(STATS)
    streams = capsys.readouterr()
    assert re.fullmatch(r" \[[\d: -]+\] iteration       10/     100 \| .* nan iterations:   0 \|\n", streams.out)
    assert streams.err == ""


def test_setting_up_again_replaces_what_was_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=0, world_size=2)
    setup_logging(rank=1, world_size=2)
    get_logger("megavlm.x").info("unseen")
    get_logger("megavlm.x").warning("once")
    streams = capsys.readouterr()
    assert (streams.out, streams.err) == ("", "[rank 1] WARNING megavlm.x: once\n")


def test_handlers_of_other_libraries_do_not_print_again(caplog: pytest.LogCaptureFixture) -> None:
    setup_logging(rank=0, world_size=1)
    get_logger("megavlm.x").warning("once")
    assert caplog.records == []


def test_only_the_chosen_level_and_above_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(rank=0, world_size=1, level=logging.WARNING)
    log_iteration(STATS)
    get_logger("megavlm.x").info("unseen")
    assert capsys.readouterr().out == ""
