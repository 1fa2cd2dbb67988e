"""Processes that do not meet: one line that says where, instead of torch's traceback."""

from __future__ import annotations

import os
import re
import socket

import pytest

from megavlm.errors import UnavailableError
from megavlm.parallel import groups as process_groups
from megavlm.testing import spawn

CASES: list[tuple[dict[str, str | None], str]] = [
    ({"RANK": "1"}, "timed out"),  # where nobody listens
    ({"RANK": "1", "MASTER_ADDR": "no.such.host.invalid"}, "timed out"),
    ({"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": None}, "1/3 clients joined"),  # the others do not come
    ({"RANK": "0", "MASTER_PORT": None}, "MASTER_PORT expected, but not set"),
]


def join_alone(settings: list[dict[str, str | None]]) -> list[str]:
    return [_refusal(one) for one in settings]


def _refusal(settings: dict[str, str | None]) -> str:
    for name, value in settings.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    with pytest.raises(UnavailableError) as caught:
        process_groups.join(timeout_minutes=0.05)
    return str(caught.value)


def test_who_meets_nobody_says_where_it_waited() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    usual = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settings = [{**usual, **changes} for changes, _ in CASES]
    (lines,) = spawn(join_alone, 1, settings)
    for one, (_, said), line in zip(settings, CASES, lines, strict=True):
        place = re.escape(f"{one['MASTER_ADDR']}:{one['MASTER_PORT']}")
        others = f"rank {one['RANK']} did not meet 2 others"
        assert re.match(f"MASTER_ADDR:MASTER_PORT = '{place}': is where {others} .*{said}.*; give", line), line
