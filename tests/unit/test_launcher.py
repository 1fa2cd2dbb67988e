"""What the launcher makes of a signal, by what its processes said of their end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megavlm import signals
from megavlm.torchrun import after_signal


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ([], os.EX_TEMPFAIL),  # they had not begun
        (["75", "75"], os.EX_TEMPFAIL),
        (["0", "0"], 0),
        (["75", ""], 1),
        (["0", ""], 1),
    ],
)
def test_a_signal_alone_is_no_reason_to_go_on(
    said: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(signals.ENDINGS, str(tmp_path))
    handlers = {number: signals.signal.getsignal(number) for number in signals.ASKING}
    for rank, word in enumerate(said):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        signals.listen()
        if word:
            assert signals.ended(int(word)) == int(word)
    for number, handler in handlers.items():
        signals.signal.signal(number, handler)
    assert after_signal("SIGTERM", signals.endings(tmp_path)) == code
