"""What a run has consumed: for each step and data-parallel rank a count and a digest, and by name what was damaged.

A digest is the sum, modulo 2^64, of a hash of each sample's (source, index, epoch). So the digests of the ranks of a
step add up to one that does not depend on how many ranks there were, and that the order alone can tell beforehand.

A folder `ledger` has one file of JSON lines for each data-parallel rank, and `data.json`: the settings, the seed and
the sizes of data sets that the order follows from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.data.files import append_whole, atomic_file, open_to_append
from megavlm.data.index import Index
from megavlm.data.loader import Damage, StepBatches
from megavlm.data.order import StepOrder, StepSamples
from megavlm.data.permutation import mixed
from megavlm.data.step_plan import DataConfig
from megavlm.errors import DataError
from megavlm.log import get_logger
from megavlm.tiles import Ints

logger = get_logger(__name__)

SETTINGS_FILE, ASIDE = "data.json", "set-aside"
LEFT_OUT = "left out"
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
        for number, path in _ranks(self.folder).items():
            if number % ranks == rank:
                set_aside(path, first_step)
        self._names_all = bool(settings["data"].get("full_ledger"))
        self._path = self.folder / _name(rank)
        self._file = open_to_append(self._path)
        self._unwritten: list[bytes] = []

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.folder / SETTINGS_FILE
        if path.exists():
            self._refuse_another_order(json.loads(path.read_text(encoding="utf-8")), settings)
        with atomic_file(path) as file:
            file.write(json.dumps(settings, indent=1).encode() + b"\n")

    def _refuse_another_order(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        """The order follows from streams, seed and sizes; rows, threads and places of data sets may change."""
        if (before["data"]["streams"], before["seed"]) != (now["data"]["streams"], now["seed"]):
            problem = "is of a run with other data settings, so its order was another one"
            raise DataError("ledger", str(self.folder), problem, "go on with its settings, or save to another folder")
        for name, size in before.get(SIZES, {}).items():
            if now[SIZES][name] != size:
                problem = f"is of a run in which {name} had {size} samples, so its order was another one"
                remedy = f"go on with that data set (it has {now[SIZES][name]} now), or save to another folder"
                raise DataError("ledger", str(self.folder), problem, remedy)

    def write(self, found: StepBatches, consumed: Ints, damaged: Sequence[Damage], names: Sequence[str]) -> None:
        """A step of this rank: `consumed` are the places in the step of its samples, dropped ones included."""
        plan = found.plan
        line: dict[str, Any] = {
            "step": found.step,
            "samples": len(consumed),
            "digest": f"{digest(plan.samples, consumed, names):016x}",
        }
        wrong = [
            {
                "source": one.sample.source,
                "index": one.sample.index,
                "problem": f"{LEFT_OUT}: {one.problem}" if one.is_too_long else one.problem,
            }
            for one in damaged
        ]
        too_long = [one.sample.place for one in damaged if one.is_too_long]
        for flags, problem in ((plan.is_cut, "cut"), (plan.is_dropped, LEFT_OUT)):
            for place in np.setdiff1d(consumed[flags[consumed]], too_long).tolist():
                name = names[int(plan.samples.source[place])]
                wrong.append({"source": name, "index": int(plan.samples.index[place]), "problem": problem})
        if wrong:
            line["notes"] = wrong
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


def _all_names(samples: StepSamples, chosen: Ints, names: Sequence[str]) -> dict[str, list[list[int]]]:
    """Source -> (index, epoch) of each chosen sample."""
    found: dict[str, list[list[int]]] = {}
    for place in chosen.tolist():
        pair = [int(samples.index[place]), int(samples.epoch[place])]
        found.setdefault(names[int(samples.source[place])], []).append(pair)
    return found


def set_aside(path: Path, first_step: int) -> None:
    """Move a rank's lines from a step on, or a broken last one, into a file of their own."""
    kept: list[str] = []
    moved: list[str] = []
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        line = _parsed(text)
        (kept if line is not None and line["step"] < first_step else moved).append(text)
    if not moved:
        return
    number = len(list(path.parent.glob(f"{ASIDE}-*")))
    (path.parent / f"{ASIDE}-{number:04d}-{path.name}").write_text("".join(moved), encoding="utf-8")
    with atomic_file(path) as file:
        file.write("".join(kept).encode())


def _parsed(text: str) -> dict[str, Any] | None:
    """A line; None where a killed run broke off in it."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _name(rank: int) -> str:
    return f"rank-{rank:05d}.jsonl"


def _ranks(folder: Path) -> dict[int, Path]:
    """The files of all ranks that the run ever had."""
    return {int(path.stem.removeprefix("rank-")): path for path in sorted(folder.glob("rank-[0-9]*.jsonl"))}


@dataclass(frozen=True)
class LedgerReport:
    """What a ledger says beside what the order says."""

    steps: int
    samples: int
    noted: int
    """Samples that were damaged, cut or left out."""
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
    found: dict[int, list[dict[str, Any]]] = {}
    wrong = []
    for path in _ranks(folder).values():
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            line = _parsed(text)
            if line is None:
                wrong.append(f"{path.name}, line {number}: broken off")
            else:
                found.setdefault(line["step"], []).append(line)
    if not found:
        raise DataError("ledger", str(folder), "holds no step", "give the folder `ledger` of a run")
    last = max(found)
    samples = noted = 0
    for step in range(last + 1):
        lines = found.get(step, [])
        expected = order.step(step)
        everything = np.arange(len(expected.index))
        count = sum(line["samples"] for line in lines)
        total = sum(int(line["digest"], 16) for line in lines) % 2**64
        if not lines:
            wrong.append(f"step {step}: lost, of {last + 1} steps")
        elif count != len(everything):
            wrong.append(f"step {step}: {count} samples, and the order has {len(everything)}")
        elif total != digest(expected, everything, names):
            wrong.append(f"step {step}: other samples than the order has")
        samples += count
        noted += sum(len(line.get("notes", [])) for line in lines)
    return LedgerReport(last + 1, samples, noted, wrong)
