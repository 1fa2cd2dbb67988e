"""The time that a search may take."""

from __future__ import annotations

import pytest

from megavlm.plan import planner
from megavlm.plan.planner import Clock


def test_no_trace_is_begun_that_would_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(planner.time, "monotonic", lambda: now[0])
    clock = Clock(50.0)
    begun = 0
    while not clock.is_late():
        begun += 1
        now[0] += 12.0
    assert begun == 4 and now[0] <= 150.0
    assert clock.is_late(), "it stays late"
