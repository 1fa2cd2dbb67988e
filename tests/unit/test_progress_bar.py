"""The progress bar of a run: on terminals alone, and out of the log's way."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from reports import logging_run, report_of, start_of

from megavlm.build.run_config import RunConfig
from megavlm.log import get_logger
from megavlm.train.callbacks.progress_bar import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def unchanged_logging() -> Iterator[None]:
    root = logging.getLogger("megavlm")
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


def train(stream: io.StringIO, run: RunConfig) -> None:
    """Two steps of a run that goes on, with a line of the log behind each."""
    handler = logging.StreamHandler(stream)
    logger = get_logger("megavlm")
    logger.handlers[:], logger.level = [handler], logging.INFO
    bar = ProgressBar(stream)
    bar.start(start_of(run, 11))
    for iteration in (11, 12):
        bar.after_step(report_of(iteration))
        get_logger("megavlm.train").info("line %d", iteration)
    bar.end(12)
    assert logger.handlers == [handler]


def screen(written: str) -> list[str]:
    """What a terminal shows, line by line."""
    return [line.rpartition("\r\033[K")[2] for line in written.split("\n")]


def test_log_lines_stand_above_the_bar() -> None:
    stream = Terminal()
    run = logging_run()
    train(stream, run.replace(train=run.train.replace(train_iters=100)))
    first, second, bar, rest = screen(stream.getvalue())
    assert (first, second, rest) == ("line 11", "line 12", "")
    assert bar.startswith("training: 12 of 100 steps (12 %)")
    # It is back behind the line, before any other step is done.
    assert "line 11\n\r\033[Ktraining: 11 of" in stream.getvalue()


@pytest.mark.parametrize(("stream", "shown"), [(io.StringIO(), True), (Terminal(), False)])
def test_files_and_who_does_not_want_it_get_none(stream: io.StringIO, shown: bool) -> None:
    train(stream, logging_run(progress_bar=shown))
    assert stream.getvalue() == "line 11\nline 12\n"
