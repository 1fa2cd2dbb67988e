"""When checkpoints are saved, kept and loaded.

A save fills `.iter_0000100.partial`, is synced and renamed; only then `latest_checkpointed_iteration.txt` points to it.
So a run that is killed at any moment goes on from a whole checkpoint. A save that fails (a full disk) is said and
forgotten; only several in a row stop the run.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megavlm.checkpoint import shelf
from megavlm.checkpoint.atomic import commit, open_staging, staging_path
from megavlm.checkpoint.frozen import Digests, check_frozen, frozen_digests, frozen_name, write_frozen
from megavlm.checkpoint.identity import check_identity
from megavlm.checkpoint.lock import LostFolderError, check_held
from megavlm.checkpoint.sealed import seal, write_file
from megavlm.checkpoint.shard_files import Plan, Written, write_lists, write_shards
from megavlm.checkpoint.sharded import Counters, counters, load_checkpoint, plan_checkpoint
from megavlm.checkpoint.state import TrainState
from megavlm.checkpoint.verify import verify_folders
from megavlm.config import Config, option, require
from megavlm.errors import CheckpointError, MegavlmError
from megavlm.log import get_logger
from megavlm.parallel.agree import agreed, said_by_first

logger = get_logger(__name__)

_OTHER_RUN = "go on with the settings of the checkpoint, or give --save another folder"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Config):
    """Where and when the state of training is saved; the same command, run again, goes on from there."""

    save_to: str | None = option(None, name="--save")
    """Folder of this run's checkpoints, and of no other run at the same time; none saves nothing."""
    load_from: str | None = option(None, name="--load")
    """Folder to go on from while that of `save_to` holds no checkpoint yet; none: start afresh."""
    save_interval: int | None = None
    """Steps between two checkpoints; none: one at the end."""
    keep_last: int | None = None
    """How many of the latest checkpoints are kept; none: all."""
    keep_every: int | None = None
    """Checkpoints of multiples of this step are kept for good."""
    async_save: bool = False
    """Write while training goes on, from a copy in host memory."""
    load_previous_if_damaged: bool = False
    """Go on from the last checkpoint that is whole; otherwise a damaged one stops the run."""
    max_save_failures: int = 3
    """Saves that may fail one after another (a full disk) before the run stops."""

    def check(self) -> None:
        for name in ("save_to", "load_from"):
            require(getattr(self, name) != "", self, name, "is empty", "name a folder, or leave it out")
        for name in ("save_interval", "keep_last", "keep_every", "max_save_failures"):
            value = getattr(self, name)
            require(value is None or value >= 1, self, name, "must be at least 1", "use a positive number")


@dataclass
class _Pending:
    """A save that is being written."""

    step: int
    counters: Counters
    plan: Plan
    thread: threading.Thread | None = None
    written: Written | None = None
    failure: OSError | None = None

    def write(self, folder: Path, rank: int) -> None:
        try:
            self.written = write_shards(self.plan, folder, rank)
        except OSError as error:
            error.filename = error.filename or str(folder)  # writing to an open file names none
            self.failure = error
        except Exception as error:  # in a thread nobody else would hear of it
            self.failure = OSError(f"{type(error).__name__}: {error}")


class CheckpointManager:
    """Saves and loads the checkpoints of one run; every rank makes one, and calls each of its methods."""

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        async_save: bool = False,
        load_previous_if_damaged: bool = False,
        max_save_failures: int = 3,
        digests: Digests | None = None,
    ) -> None:
        """`digests`: those of the frozen weights, where they are known already."""
        self.folder = Path(folder)
        self._keep_last, self._keep_every = keep_last, keep_every
        self._async_save, self._max_save_failures = async_save, max_save_failures
        self._load_previous = load_previous_if_damaged
        self._failures = 0
        self._pending: _Pending | None = None
        self._digests = digests
        self._sound_frozen: set[str] = set()
        self._is_open = False
        self.last_saved: int | None = None
        """The step of the latest checkpoint that this manager loaded or finished."""

    def open(self, state: TrainState) -> None:
        """Make the folder, and clear away what a killed run left in it; only the run that saves there may do so."""
        with agreed():
            if state.groups.rank == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                shelf.clear_leftovers(self.folder)
        self._is_open = True

    def save(self, state: TrainState, step: int) -> float | None:
        """Save the state behind this step; return for how many milliseconds training stood still, None if it failed.

        A failure is logged, that of a save in the background when it is concluded; `max_save_failures` of them in a row
        raise.
        """
        began = time.perf_counter()
        self.finish(state)
        try:
            self._prepare(state, step)
            taken = counters(state)
            pending = _Pending(step, taken, plan_checkpoint(state, snapshot=self._async_save))
        except MegavlmError as error:
            self._failed(step, error)
            return None
        self._pending = pending
        staging = staging_path(shelf.checkpoint_path(self.folder, step))
        if self._async_save:
            pending.thread = threading.Thread(target=pending.write, args=(staging, state.groups.rank), daemon=True)
            pending.thread.start()
        else:
            pending.write(staging, state.groups.rank)
            if not self._conclude(state):
                return None
        blocked = _milliseconds_since(began)
        logger.info("checkpoint of step %d: training stood still for %.0f ms", step, blocked)
        return blocked

    def poll(self, state: TrainState) -> None:
        """Conclude a save in the background if all ranks have written their part; to be called after each step."""
        if self._pending is None:
            return
        assert self._pending.thread is not None
        busy = torch.tensor(int(self._pending.thread.is_alive()), device=state.groups.device)
        dist.all_reduce(busy, op=dist.ReduceOp.MAX)
        if not busy:
            self._conclude(state)

    def finish(self, state: TrainState) -> None:
        """Wait for a save in the background; to be called before the run ends."""
        if self._pending is not None:
            self._conclude(state)

    def _prepare(self, state: TrainState, step: int) -> None:
        """All that can fail before the shards are written: frozen weights, and the staging folder."""
        with agreed():
            if state.groups.rank == 0:
                check_held(self.folder)
        if not self._is_open:
            self.open(state)
        frozen = frozen_name(self._digests_of(state))
        if frozen is not None and frozen not in self._sound_frozen:
            path = self.folder / frozen
            if said_by_first(path.is_dir()):
                verify_folders([], [path], *_place(state))
            else:
                write_frozen(state, self._digests_of(state), path)
            self._sound_frozen.add(frozen)
        with agreed():
            if state.groups.rank == 0:
                open_staging(shelf.checkpoint_path(self.folder, step), overwrite=True)

    def _conclude(self, state: TrainState) -> bool:
        """With all shards written: the lists, the seal, the name, the pointer; then old checkpoints go. Whether it is
        done, which a full disk may prevent."""
        pending, self._pending = self._pending, None
        assert pending is not None
        if pending.thread is not None:
            pending.thread.join()
        path = shelf.checkpoint_path(self.folder, pending.step)
        try:
            with agreed():
                if pending.failure is not None:
                    raise pending.failure
            parts: list[Written | None] | None = [None] * state.groups.world_size if state.groups.rank == 0 else None
            dist.gather_object(pending.written, parts, dst=0)
            with agreed():
                if parts is not None:
                    self._commit(state, pending, [part for part in parts if part is not None], path)
        except MegavlmError as error:
            self._failed(pending.step, error)
            return False
        self._failures = 0
        self.last_saved = pending.step
        logger.info("saved checkpoint %s", path)
        return True

    def _commit(self, state: TrainState, pending: _Pending, parts: list[Written], path: Path) -> None:
        check_held(self.folder)
        staging = staging_path(path)
        metadata = pending.plan.metadata
        assert metadata is not None
        lists = write_lists(metadata, parts, staging, {"iteration": pending.step})
        files = {name: entry for part in (*parts, lists) for name, entry in part.files.items()}
        files[shelf.RUN_FILE] = write_file(staging / shelf.RUN_FILE, shelf.run_bytes(self._record(state, pending)))
        seal(staging, files)
        commit(staging, path, overwrite=True)
        shelf.set_latest(self.folder, pending.step)
        try:
            shelf.drop(self.folder, self._keep_last, self._keep_every, pending.step)
        except OSError as error:
            logger.warning("old checkpoints of %s could not be removed: %s", self.folder, error)

    def _record(self, state: TrainState, pending: _Pending) -> dict[str, Any]:
        return {
            "format": shelf.FORMAT,
            "step": pending.step,
            **asdict(pending.counters),
            "layout": state.layout,
            "frozen": frozen_name(self._digests_of(state)),
            "identity": dict(state.identity),
            "run": dict(state.run),
            "versions": _versions(),
        }

    def _failed(self, step: int, error: MegavlmError) -> None:
        if isinstance(error, LostFolderError):
            raise error
        self._failures += 1
        if dist.get_rank() == 0:  # what was written of it takes room that the next one may need
            shutil.rmtree(staging_path(shelf.checkpoint_path(self.folder, step)), ignore_errors=True)
            for leftover in self.folder.glob(".frozen-*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
        if error.printed_by_rank in (None, dist.get_rank()):
            logger.warning(
                "no checkpoint of step %d (%d in a row, the run stops at %d): %s",
                step,
                self._failures,
                self._max_save_failures,
                error,
            )
        if self._failures >= self._max_save_failures:
            stop = CheckpointError(
                str(self.folder),
                str(error),
                f"{self._failures} checkpoints in a row could not be saved",
                f"make room and start again; the last good one is that of step {self.last_saved}",
            )
            stop.printed_by_rank = error.printed_by_rank
            raise stop from error

    def load_latest(self, state: TrainState) -> int | None:
        """Fill the state from the latest checkpoint and return its step; None where the folder holds none.

        A damaged one, or one of another run, raises before the state is touched.
        """
        candidates = self._candidates(state)
        for step in candidates:
            path = shelf.checkpoint_path(self.folder, step)
            try:
                record = self._verified(state, path)
            except CheckpointError as error:
                if not self._load_previous or step == candidates[-1]:
                    raise
                if error.printed_by_rank == state.groups.rank:
                    logger.warning("checkpoint of step %d is passed over: %s", step, error)
                continue
            with agreed():
                check_identity(record["identity"], state.identity, path / shelf.RUN_FILE, _OTHER_RUN)
            held = self._digests_of(state)
            with agreed():
                if record["frozen"] is not None:
                    check_frozen(held, self.folder / record["frozen"])
            found = Counters(record["optimizer_steps"], record["scheduler_steps"])
            load_checkpoint(state, path, step, found, record["layout"])
            self.last_saved = step
            logger.info("loaded checkpoint %s", path)
            return step
        return None

    def _candidates(self, state: TrainState) -> list[int]:
        """The latest checkpoint, and behind it those before it where they may stand in; rank 0 looks."""
        steps: list[int] = []
        with agreed():
            if state.groups.rank == 0:
                steps = self._look()
        return list(said_by_first(steps))

    def _look(self) -> list[int]:
        saved = shelf.steps_saved(self.folder)[::-1]
        try:
            latest = shelf.latest_step(self.folder)
        except CheckpointError as error:
            if not (self._load_previous and saved):
                raise
            logger.warning("%s", error)
            return saved
        newer = [step for step in saved if latest is not None and step > latest]
        if newer:
            logger.warning("%s says %d; newer checkpoints are left alone: %s", shelf.LATEST_FILE, latest, newer)
        return [] if latest is None else [step for step in saved if step <= latest]

    def _verified(self, state: TrainState, path: Path) -> dict[str, Any]:
        """The record of a checkpoint whose every byte, frozen weights included, is what was written."""
        verify_folders([path], [], *_place(state))
        with agreed():
            record = shelf.read_run(path)
        frozen = record["frozen"]
        if frozen is not None and frozen not in self._sound_frozen:
            verify_folders([], [self.folder / frozen], *_place(state))
            self._sound_frozen.add(frozen)
        return record

    def _digests_of(self, state: TrainState) -> Digests:
        """Of the weights that stay as they are: computed once."""
        if self._digests is None:
            self._digests = frozen_digests(state)
        return self._digests


def _place(state: TrainState) -> tuple[int, int, torch.device]:
    return state.groups.rank, state.groups.world_size, state.groups.device


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("megavlm", "torch", "megatron-core")}
    return {"python": platform.python_version(), **packages}


def _milliseconds_since(began: float) -> float:
    return (time.perf_counter() - began) * 1000
