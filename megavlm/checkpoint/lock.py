"""One run at a time trains into a folder: a small file there says which, and is touched as long as that run lives.

A file that is made exclusively, for `flock` ends at a node's border on some mounts of shared file systems. Whether the
run of a file that is found still lives is asked of the kernel where it is the same one, of Slurm's numbers where its
job was put back into the queue, and else of the file: it is watched until it is touched, or until it should have been.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megavlm.checkpoint.sealed import MARK_FILE
from megavlm.errors import CheckpointError, MegavlmError
from megavlm.log import get_logger
from megavlm.parallel.agree import agreed, said_by_first

logger = get_logger(__name__)

LOCK_FILE = "in_use.json"
HEARTBEAT = 10.0
"""Seconds between two touches of the file."""
STALE_AFTER = 180.0
"""Seconds without a touch behind which a run of another node counts as dead."""
WATCHED_FOR = 30.0
"""Seconds that the file is watched for a touch, however old it seems: on some file systems nodes put their own clocks'
time on it."""
PATIENCE = 10.0
"""Seconds that a living process of this node is given to end: those of a killed launcher need five."""
BETWEEN_LOOKS = 0.5

_LARGEST = 4096


class LostFolderError(CheckpointError):
    """The folder that a run saves in became another run's: nothing in it may be touched any more."""


@dataclass(frozen=True)
class Holder:
    """A run, by its first process."""

    token: str
    """Its alone."""
    host: str
    kernel: str
    """Where numbers of processes mean the same: a start of a machine, and a container's view of it."""
    pid: int
    started: int
    """When, in the kernel's ticks: a later process may be given the same number."""
    job: str
    """Its number in Slurm; empty outside of it."""
    restarts: str
    """How often Slurm had put the job back into the queue."""
    since: str

    @classmethod
    def this_process(cls) -> Holder:
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            kernel=_kernel(),
            pid=os.getpid(),
            started=_start_of_this_process(),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restarts=os.environ.get("SLURM_RESTART_COUNT", "0"),
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Holder | None:
        """None where the file says nothing: its maker was killed, or has not come to write yet."""
        try:
            fields = json.loads(content)
            holder = cls(**fields)
        except (ValueError, TypeError, RecursionError):
            return None
        numbers, words = (holder.pid, holder.started), [fields[name] for name in fields.keys() - {"pid", "started"}]
        is_sound = all(type(number) is int and 0 < number < 2**63 for number in numbers) and holder.pid < 2**31
        return holder if is_sound and all(isinstance(word, str) and word.isprintable() for word in words) else None

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def lives(self, asking: Holder) -> bool | None:
        """Whether it does, as far as the process that asks can know without waiting."""
        if self.kernel == asking.kernel:
            return _is_alive(self.pid, self.started)
        if self.job and self.job == asking.job and self.restarts != asking.restarts:
            return False  # Slurm has ended all of a job before it starts it anew
        return None


@dataclass(frozen=True)
class _Seen:
    """What a look at the file found."""

    content: bytes
    touched: float

    @property
    def holder(self) -> Holder | None:
        return Holder.from_bytes(self.content)

    @property
    def words(self) -> str:
        """The run that it names, for the user."""
        holder = self.holder
        if holder is None:
            return "a run that has not written its name"
        job = f", Slurm job {holder.job}" if holder.job else ""
        return f"process {holder.pid} on {holder.host}{job}, since {holder.since}"


class FolderLock:
    """Of the first rank of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._path = folder, folder / LOCK_FILE
        self._me = Holder.this_process()
        self._content = self._me.to_bytes()
        self._watched: tuple[_Seen, float] | None = None  # the first look at a run's file, and when that was
        self._lost: str | None = None
        self._touched = 0.0
        self._thread: threading.Thread | None = None
        self._ended, self._refreshing = threading.Event(), threading.Lock()

    def take(self) -> bool:
        """Whether the folder is this run's from now on; False: it is to be asked again in a while.

        Raises where another run trains into it.
        """
        refuse_inside_checkpoint(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._create():
            seen = _look(self._path)
            if seen is not None and not self._is_dead(seen):
                return False
            if seen is not None:
                self._clear_away(seen)
            if not self._create():
                return False  # another was faster
        self._touched = time.monotonic()
        self._thread = threading.Thread(target=self._keep, name="folder lock", daemon=True)
        self._thread.start()
        _held[self.folder.resolve()] = self
        return True

    def check(self) -> None:
        """Refuse to go on in a folder that has become another run's."""
        self._refresh()
        if self._lost is not None:
            problem = (
                f"is no longer this run's: it was not heard of, or {LOCK_FILE} was removed, and then came {self._lost}"
            )
            remedy = "this run ends and leaves the folder alone; start it again when the other has ended"
            raise LostFolderError("--save", str(self.folder), problem, remedy)

    def release(self) -> None:
        """Give the folder free, if it is still this run's."""
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join(HEARTBEAT)
        _held.pop(self.folder.resolve(), None)
        with contextlib.suppress(OSError):
            seen = _look(self._path)
            if seen is not None and seen.content == self._content:
                self._path.unlink()

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "wb") as file:
                file.write(self._content)
                file.flush()
                os.fsync(descriptor)
        except OSError as error:
            self._path.unlink(missing_ok=True)
            error.filename = str(self._path)  # writing to an open file names none
            raise
        return True

    def _is_dead(self, seen: _Seen) -> bool:
        """Whether the run of the file is; raises where it surely is not. False: not known yet."""
        now = time.monotonic()
        if self._watched is None or self._watched[0].content != seen.content:
            self._watched = seen, now
            logger.info("%s is in use by %s: looking whether that still lives", self.folder, seen.words)
        first, waited = self._watched[0], now - self._watched[1]
        holder = seen.holder
        lives = None if holder is None else holder.lives(self._me)
        if (lives and waited >= PATIENCE) or (lives is None and seen.touched != first.touched):
            raise self._refusal(seen)
        if lives is not None:
            return not lives
        return waited >= STALE_AFTER or (waited >= WATCHED_FOR and self._clock() - seen.touched >= STALE_AFTER)

    def _refusal(self, seen: _Seen) -> MegavlmError:
        job = seen.holder.job if seen.holder else ""
        cancel = f"cancel it (scancel {job})" if job else "end it"
        remedy = f"wait for it, {cancel}, or give --save another folder; if it is surely dead, remove {self._path}"
        return CheckpointError("--save", str(self.folder), f"another run trains into it: {seen.words}", remedy)

    def _clock(self) -> float:
        """The time by the file system's clock, which this node's may differ from."""
        probe = self._beside("clock")
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _clear_away(self, dead: _Seen) -> None:
        """Remove the file of a dead run, and not one that another newcomer has put in its place since.

        Of several that rename it one succeeds, and sees what it has got.
        """
        aside = self._beside("dead")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        if aside.read_bytes() == dead.content:
            aside.unlink()
        else:
            aside.rename(self._path)

    def _beside(self, word: str) -> Path:
        return self._path.with_name(f".{LOCK_FILE}.{self._me.token}.{word}")

    def _keep(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            # A disk may be away for a moment; a save tells of one that stays away.
            with contextlib.suppress(OSError):
                if self._refresh():
                    logger.warning("%s is now in use by %s: this run ends at its next save", self.folder, self._lost)

    def _refresh(self) -> bool:
        """Touch the file; whether it turned out now that the folder is lost."""
        with self._refreshing:
            if self._lost is not None or self._ended.is_set():
                return False
            seen = _look(self._path)
            if seen is None and time.monotonic() - self._touched < STALE_AFTER:
                self._create()
            elif seen is None:  # stopped for so long, others may have come and gone
                self._lost = "another one"
            elif seen.content != self._content:
                self._lost = seen.words
            else:
                os.utime(self._path)
            self._touched = time.monotonic()
            return self._lost is not None


_held: dict[Path, FolderLock] = {}
"""Of this process."""


@contextlib.contextmanager
def held(folder: str | Path | None) -> Iterator[None]:
    """Be the only run that trains into the folder, if there is one; every rank enters it, and all get its error."""
    if folder is None:
        yield
        return
    lock: FolderLock | None = None
    try:
        with agreed():
            if dist.get_rank() == 0:
                lock = FolderLock(Path(folder))
        # All ask together, again and again, so that none waits in a collective for longer than a look takes.
        while not _is_taken(lock):
            time.sleep(BETWEEN_LOOKS)
        yield
    finally:
        if lock is not None:
            lock.release()


def _is_taken(lock: FolderLock | None) -> bool:
    taken = False
    with agreed():
        if lock is not None:
            taken = lock.take()
    return said_by_first(taken)


def check_held(folder: Path) -> None:
    """Refuse to save where another run has taken over what this process held; the first rank asks."""
    lock = _held.get(folder.resolve())
    if lock is not None:
        lock.check()


def refuse_inside_checkpoint(folder: Path) -> None:
    """A checkpoint is believed only with exactly the files that it was saved with."""
    resolved = folder.resolve()
    for place in (resolved, *resolved.parents):
        if (place / MARK_FILE).is_file():
            problem = f"lies in the checkpoint {place}, which could not be read any more with a run's files in it"
            remedy = f"give --save the folder above it to go on there ({place.parent}), or another one"
            raise CheckpointError("--save", str(folder), problem, remedy)


def _look(path: Path) -> _Seen | None:
    """By opening it, for NFS keeps what it knows of an unopened file for up to a minute."""
    try:
        with path.open("rb") as file:
            return _Seen(file.read(_LARGEST), os.fstat(file.fileno()).st_mtime)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise


def _kernel() -> str:
    """The machine by its name alone where the kernel tells no more, as macOS."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_of_this_process() -> int:
    try:
        return _state_and_start(os.getpid())[1]
    except OSError:
        return 1  # never looked at: of others it is not told either


def _is_alive(pid: int, started: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is there, another user's
    try:
        state, start = _state_and_start(pid)
    except OSError:
        return True  # not to be looked at, or ending just now
    return start == started and state not in "ZX"


def _state_and_start(pid: int) -> tuple[str, int]:
    """As the kernel lists them behind the name, which may hold anything."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])
