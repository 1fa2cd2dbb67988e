"""What a progress line says, on a terminal and elsewhere."""

from __future__ import annotations

import io

from megavlm.data.progress import Progress, clock, line


def test_the_line_has_share_rate_and_time_left() -> None:
    assert line("preparing", 2_500, 10_000, "records", 2_000, 40.0) == (
        "preparing: 2,500 of 10,000 records (25 %), 50 records/s, 2:30 left"
    )
    assert line("counting", 1, 4, "files", 1, 10.0) == "counting: 1 of 4 files (25 %), 0.1 files/s, 0:30 left"
    assert line("preparing", 0, 0, "records", 0, 0.0) == "preparing: 0 records"
    assert line("preparing", 9, 9, "records", 9, 0.5) == "preparing: 9 of 9 records (100 %), 18 records/s"
    assert clock(3_725) == "1:02:05"


def test_a_terminal_renews_one_line_and_a_file_gets_few() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, expected in ((Terminal(), "\r\033[Kx: 5 of 5 y (100 %)\n"), (io.StringIO(), "x: 5 of 5 y (100 %)\n")):
        progress = Progress("x", 5, "y", stream)
        for done in range(6):
            progress.update(done)
        progress.finish(5)
        assert stream.getvalue() == expected
