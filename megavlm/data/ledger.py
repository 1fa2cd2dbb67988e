"""What a run has consumed: for each step and data-parallel rank a count and a digest, and by name what was damaged.

A digest is the sum, modulo 2^64, of a hash of each sample's (source, index, epoch). So the digests of the ranks of a
step add up to one that does not depend on how many ranks there were, and that the order alone can tell beforehand.

What a recipe cuts or leaves out for its length may be every fourth sample, so these are not named: a line has their
numbers by source, and a digest that tells whether two runs cut the same ones. `--full-ledger` names everything.

A folder `ledger` has one file of JSON lines for each data-parallel rank, and `data.json`: the settings, the seed and
the sizes of data sets that the order follows from.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from megavlm.data.files import AT_ONCE, append_whole, atomic_file, numbered_line, open_to_append, where_to_cut
from megavlm.data.index import Index
from megavlm.data.loader import Damage, StepBatches
from megavlm.data.order import StepOrder, StepSamples
from megavlm.data.permutation import mixed
from megavlm.data.step_plan import DataConfig, StepPlan
from megavlm.errors import DataError
from megavlm.log import get_logger
from megavlm.tiles import Ints

logger = get_logger(__name__)

SETTINGS_FILE, ASIDE = "data.json", "set-aside"
CUT, LEFT_OUT, DAMAGED = "cut", "left out", "damaged"
UNCUT = f"{LEFT_OUT}: cannot be cut"
"""Of samples that end with an image: only who reads them can tell."""
MOST_NAMED = 20
"""Damaged samples of a line that are named where not all are; more of them are counted. A data set that has gone
missing would write much more until `--max-damaged-fraction` stops the run."""
LONGEST_PROBLEM = 300
SIZES = "sizes"
"""Among the settings: how many samples each data set has."""


def digest(samples: StepSamples, chosen: Ints, names: Sequence[str]) -> int:
    """Of the chosen samples of a step; `names` are those of the sources."""
    of_source = np.array([_word(name) for name in names], np.uint64)
    with np.errstate(over="ignore"):
        words = of_source[samples.source[chosen]]
        words = mixed(words + mixed(samples.index[chosen].astype(np.uint64) + np.uint64(1)))
        words = mixed(words + samples.epoch[chosen].astype(np.uint64))
        return int(words.sum(dtype=np.uint64))


def _word(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class LedgerWriter:
    """One data-parallel rank's file; a line a step, written before the step is trained on.

    Lines that a full disk does not take are kept, and written as soon as it does: training goes on.
    """

    def __init__(
        self, folder: str | Path, rank: int, settings: dict[str, Any], first_step: int, ranks: int = 1
    ) -> None:
        """Lines of steps from `first_step` on, of a run that went further before it was stopped, are set aside.

        Also those of ranks that there are no more: each of the `ranks` looks after some.
        """
        self.folder, self.rank = Path(folder), rank
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            self._check_settings(settings)
        mine = [path for number, path in _ranks(self.folder).items() if number % ranks == rank]
        moved = [aside for path in mine if (aside := set_aside(path, first_step))]
        if moved and rank == 0:
            words = "%s: the lines behind step %d, and what cannot be read there, are set aside (%s)"
            logger.info(words, self.folder, first_step, moved[0].name, extra={"from_any_rank": True})
        self._names_all = bool(settings["data"].get("full_ledger"))
        self._path = self.folder / _name(rank)
        self._file = open_to_append(self._path)
        self._unwritten: list[bytes] = []

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.folder / SETTINGS_FILE
        if path.exists():
            self._refuse_another_order(*_order_settings(path), settings)
        with atomic_file(path) as file:
            file.write(json.dumps(settings, indent=1).encode() + b"\n")

    def _refuse_another_order(self, order: Any, sizes: dict[str, Any], now: dict[str, Any]) -> None:
        """The order follows from streams, seed and sizes; rows, threads and places of data sets may change."""
        if order != (now["data"]["streams"], now["seed"]):
            problem = "is of a run with other data settings, so its order was another one"
            raise DataError("ledger", str(self.folder), problem, "go on with its settings, or save to another folder")
        for name, size in sizes.items():
            if (size_now := now[SIZES].get(name)) != size:
                problem = f"is of a run in which {name} had {size} samples, so its order was another one"
                remedy = f"go on with that data set (it has {size_now} now), or save to another folder"
                raise DataError("ledger", str(self.folder), problem, remedy)

    def write(self, found: StepBatches, consumed: Ints, damaged: Sequence[Damage], names: Sequence[str]) -> None:
        """A step of this rank: `consumed` are the places in the step of its samples, dropped ones included."""
        plan = found.plan
        line: dict[str, Any] = {
            "step": found.step,
            "samples": len(consumed),
            "digest": f"{digest(plan.samples, consumed, names):016x}",
        }
        planned = _planned(plan, consumed, damaged)
        if self._names_all:
            notes, counted = _notes(damaged) + _notes_of_planned(plan.samples, planned, names), {}
        else:
            broken = [one for one in damaged if not one.is_too_long]
            notes = [{**note, "problem": _shortened(note["problem"])} for note in _notes(broken[:MOST_NAMED])]
            planned[UNCUT] = _places(one for one in damaged if one.is_too_long)
            planned[DAMAGED] = _places(broken[MOST_NAMED:])
            counted = {what: _counted(plan.samples, places, names) for what, places in planned.items() if len(places)}
        if notes:
            line["notes"] = notes
        if counted:
            line["counted"] = counted
        if self._names_all:
            line["names"] = _all_names(plan.samples, consumed, names)
        self._append(json.dumps(line).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        was_failing = bool(self._unwritten)
        self._unwritten.append(line)
        try:
            append_whole(self._file, b"".join(self._unwritten))
        except OSError as error:
            if not was_failing:
                logger.warning("%s cannot be written (%s); its lines are kept until it can", self._path, error.strerror)
            return
        if was_failing:
            logger.warning("%s is written again; it lacks nothing", self._path)
        self._unwritten.clear()

    def close(self) -> None:
        """What the disk has not taken by now is lost, and said."""
        os.close(self._file)
        if self._unwritten:
            logger.warning("%s lacks its last %d lines, for which there was no room", self._path, len(self._unwritten))


def _order_settings(path: Path) -> tuple[Any, dict[str, Any]]:
    """What a run's order followed from: (streams, seed), and the sizes of data sets."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return (settings["data"]["streams"], settings["seed"]), dict(settings.get(SIZES, {}))
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError("ledger", str(path), "cannot be read", "copy it again, or save to another folder") from None


def _planned(plan: StepPlan, consumed: Ints, damaged: Sequence[Damage]) -> dict[str, Ints]:
    """What was to become of samples -> their places in the step; without those that turned out to be impossible."""
    impossible = _places(one for one in damaged if one.is_too_long)
    flags = {CUT: plan.is_cut, LEFT_OUT: plan.is_dropped}
    return {what: np.setdiff1d(consumed[of_all[consumed]], impossible) for what, of_all in flags.items()}


def _places(damaged: Iterable[Damage]) -> Ints:
    return np.array([one.sample.place for one in damaged], np.int64)


def _notes(damaged: Iterable[Damage]) -> list[dict[str, Any]]:
    return [
        {
            "source": one.sample.source,
            "index": one.sample.index,
            "problem": f"{LEFT_OUT}: {one.problem}" if one.is_too_long else one.problem,
        }
        for one in damaged
    ]


def _notes_of_planned(samples: StepSamples, planned: dict[str, Ints], names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"source": names[int(samples.source[place])], "index": int(samples.index[place]), "problem": what}
        for what, places in planned.items()
        for place in places.tolist()
    ]


def _shortened(problem: str) -> str:
    return problem if len(problem) <= LONGEST_PROBLEM else problem[: LONGEST_PROBLEM - 3] + "..."


def _counted(samples: StepSamples, places: Ints, names: Sequence[str]) -> dict[str, Any]:
    """How many there are of each source, and the digest that tells whether they are the same as another run's."""
    numbers: dict[str, int] = {}
    for source, number in zip(*np.unique(samples.source[places], return_counts=True), strict=True):
        numbers[names[int(source)]] = numbers.get(names[int(source)], 0) + int(number)
    return {"samples": numbers, "digest": f"{digest(samples, places, names):016x}"}


def _all_names(samples: StepSamples, chosen: Ints, names: Sequence[str]) -> dict[str, list[list[int]]]:
    """Source -> (index, epoch) of each chosen sample."""
    found: dict[str, list[list[int]]] = {}
    for place in chosen.tolist():
        pair = [int(samples.index[place]), int(samples.epoch[place])]
        found.setdefault(names[int(samples.source[place])], []).append(pair)
    return found


def set_aside(path: Path, first_step: int) -> Path | None:
    """Move a rank's lines from a step on, and what broke off behind the others, into a file of their own, if any.

    Steps rise in a file, so these lines are its end, and only that is read.
    """
    end, aside = where_to_cut(path, _step_of, first_step), None
    with path.open("r+b") as file:
        if end < file.seek(0, os.SEEK_END):
            aside = _name_aside(path)
            file.seek(end)
            with atomic_file(aside) as moved:
                shutil.copyfileobj(file, moved, AT_ONCE)
            file.truncate(end)
        _end_last_line(file, end)
        file.flush()
        os.fsync(file.fileno())
    return aside


def _name_aside(path: Path) -> Path:
    numbers = count(len(list(path.parent.glob(f"{ASIDE}-*"))))
    names = (path.parent / f"{ASIDE}-{number:04d}-{path.name}" for number in numbers)
    return next(name for name in names if not name.exists())


def _end_last_line(file: BinaryIO, size: int) -> None:
    """A whole line of which only the end is missing would swallow the next one."""
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.write(b"\n")


def _step_of(_: int, line: bytes) -> int | None:
    """None where a killed run broke off in the line, or it is none of a ledger."""
    found = numbered_line(line, "step")
    return None if found is None else int(found["step"])


def _name(rank: int) -> str:
    return f"rank-{rank:05d}.jsonl"


def _ranks(folder: Path) -> dict[int, Path]:
    """The files of all ranks that the run ever had."""
    numbers = ((path.stem.removeprefix("rank-"), path) for path in sorted(folder.glob("rank-*.jsonl")))
    return {int(number): path for number, path in numbers if number.isascii() and number.isdecimal()}


@dataclass(frozen=True)
class LedgerReport:
    """What a ledger says beside what the order says."""

    steps: int
    samples: int
    damaged: int
    """Samples that could not be read."""
    shortened: int
    """Samples that were cut or left out for their length."""
    wrong: list[str] = field(default_factory=list)
    """What does not hold, one line each."""


def order_of_ledger(folder: str | Path, data_path: str | None = None) -> StepOrder:
    """The order that the run of a ledger followed; `data_path` where its data sets have moved since."""
    path = Path(folder) / SETTINGS_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        config, seed, known = DataConfig.from_dict(settings["data"]), int(settings["seed"]), settings.get(SIZES, {})
    except FileNotFoundError:
        raise DataError(
            "ledger", str(folder), f"holds no {SETTINGS_FILE}", "give the folder `ledger` of a run"
        ) from None
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError("ledger", str(path), "cannot be read", "copy it again") from None
    sizes = {
        source.name: len(Index.open(Path(data_path or config.path) / source.name))
        for stream in config.streams
        for source in stream.sources
    }
    for name, size in sizes.items():
        if known.get(name, size) != size:
            problem = f"is of a run in which {name} had {known[name]} samples, and it has {size} now"
            raise DataError(
                "ledger", str(folder), problem, "name the folder of the data sets as they were by --data-path"
            )
    return StepOrder(config.streams, sizes, seed)


def check_ledger(folder: str | Path, order: StepOrder) -> LedgerReport:
    """Compare every step of a ledger with the order: nothing lost, nothing twice, nothing else."""
    folder = Path(folder)
    names = [source.name for source in order.sources]
    found: dict[int, _Sums] = {}
    wrong = []
    for path in _ranks(folder).values():
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                line = _sums(text)
                if line is None:
                    wrong.append(f"{path.name}, line {number}: broken off, or none of a ledger")
                else:
                    step = int(line.step)
                    found[step] = found[step].plus(line) if step in found else line
    if not found:
        raise DataError("ledger", str(folder), "holds no step", "give the folder `ledger` of a run")
    last = max(found)
    for step in range(last + 1):
        line = found.get(step)
        expected = order.step(step)
        everything = np.arange(len(expected.index))
        if line is None:
            wrong.append(f"step {step}: lost, of {last + 1} steps")
        elif line.samples != len(everything):
            wrong.append(f"step {step}: {line.samples} samples, and the order has {len(everything)}")
        elif line.digest != digest(expected, everything, names):
            wrong.append(f"step {step}: other samples than the order has")
    total = functools.reduce(_Sums.plus, found.values())
    return LedgerReport(last + 1, total.samples, total.damaged, total.shortened, wrong)


class _Sums(NamedTuple):
    """Of the lines of a step."""

    step: int
    samples: int
    digest: int
    damaged: int
    shortened: int

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(
            self.step,
            self.samples + other.samples,
            (self.digest + other.digest) % 2**64,
            self.damaged + other.damaged,
            self.shortened + other.shortened,
        )


def _sums(text: bytes) -> _Sums | None:
    """A line's; None where it is none of a ledger, of this form or of the one that named all that was cut."""
    line = numbered_line(text, "step")
    try:
        if line is None:
            return None
        problems = Counter(str(note["problem"]) for note in line.get("notes", []))
        for problem, one in line.get("counted", {}).items():
            problems[problem] += sum(map(int, one["samples"].values()))
        shortened = sum(problems[one] for one in problems if one == CUT or one.startswith(LEFT_OUT))
        damaged = problems.total() - shortened
        return _Sums(line["step"], int(line["samples"]), int(line["digest"], 16) % 2**64, damaged, shortened)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
