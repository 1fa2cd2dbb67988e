"""Checkpoints: saves that training hardly waits for and loads with every byte checked, against torch.save and load.

Both sides keep the same state (bf16 weights that learn, float32 masters, two moments) on the same disk, whole and
synced before a save counts as done, and out of the page cache before a load. A pass of either is a save, after which
the state in memory is wiped, and a load; what came back must be what was saved. Frozen weights are written once, with
the first save.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import Tensor

from megavlm.bench.decoder_step import run_of
from megavlm.bench.harness import THREADS, Comparison, Figure, NoRowError, Pass, Side, SkippedError, figure
from megavlm.bench.processes import Memory, available_memory, trim_memory
from megavlm.build.model import build_model
from megavlm.build.run_config import (
    CrossAttentionConfig,
    DecoderConfig,
    InfiMMConfig,
    PrecisionConfig,
    ResamplerConfig,
    RunConfig,
    eva_tower,
)
from megavlm.checkpoint import shelf
from megavlm.checkpoint.frozen import frozen_digests
from megavlm.checkpoint.manager import CheckpointManager
from megavlm.checkpoint.optimizer_state import MASTER, slots
from megavlm.checkpoint.state import TrainState
from megavlm.checkpoint.verify import verify_folders
from megavlm.parallel import groups as parallel_groups
from megavlm.parallel.groups import Groups
from megavlm.parallel.wrap import wrap_data_parallel
from megavlm.recipes import recipe
from megavlm.train.checkpointing import train_state
from megavlm.train.optim import build_optimizer


def checkpoint_run(quick: bool = False) -> RunConfig:
    """A decoder of 98M parameters, all of which learn."""
    run = run_of(quick)
    return run.replace(name="checkpoint", precision=PrecisionConfig(params_dtype="bfloat16"))


def checkpoint_1b_run() -> RunConfig:
    """An InfiMM of 1.2B parameters with gated blocks before all layers: these and the resampler learn."""
    decoder = DecoderConfig(
        num_layers=8,
        hidden_size=2048,
        ffn_hidden_size=5632,
        num_attention_heads=32,
        num_query_groups=32,
        kv_channels=64,
        vocab_size=32_002,
    )
    tower = eva_tower("EVA02-CLIP-L/14-336")
    parts = InfiMMConfig(
        model_type="infimm-llama",
        tower=tower,
        resampler=ResamplerConfig(width=tower.width),
        cross_attention=CrossAttentionConfig(every_n_layers=1),
    )
    return RunConfig(
        name="checkpoint-1b",
        decoder=decoder,
        infimm=parts,
        trainable=("cross_attention", "resampler"),
        precision=PrecisionConfig(params_dtype="bfloat16"),
    )


def checkpoint_1b_trained_run() -> RunConfig:
    """A decoder of 1.0B parameters, all of which learn."""
    run = checkpoint_run()
    decoder = run.decoder.replace(num_layers=22, hidden_size=2048, ffn_hidden_size=5632, num_attention_heads=32)
    return run.replace(name="checkpoint-1b-trained", decoder=decoder)


@contextmanager
def checkpoint(quick: bool) -> Iterator[tuple[Comparison, ...]]:
    """All of 98M parameters learn."""
    with _compared("checkpoint", checkpoint_run(quick), quick, Needs(memory=5, disk=5)) as found:
        yield found


@contextmanager
def checkpoint_1b(quick: bool) -> Iterator[tuple[Comparison, ...]]:
    """The same, where of 1.2B parameters a third learns."""
    run = checkpoint_1b_run()
    if quick:
        run = recipe("infimm-tiny/multitask").replace(precision=run.precision)
    with _compared("checkpoint-1b", run, quick, Needs(memory=17, disk=18)) as found:
        yield found


@contextmanager
def checkpoint_1b_trained(quick: bool) -> Iterator[tuple[Comparison, ...]]:
    """The same, where all of 1.0B parameters learn."""
    run = checkpoint_run(True) if quick else checkpoint_1b_trained_run()
    with _compared("checkpoint-1b-trained", run, quick, Needs(memory=40, disk=45)) as found:
        yield found


@dataclass(frozen=True)
class Needs:
    """Gigabytes. Of memory 18 bytes for each parameter that learns (weight, gradient, master, moments) and about as
    much while they are loaded, 2 for a frozen one; of disk three times what is written, 14 for one that learns."""

    memory: float
    disk: float

    def check(self, place: Path) -> None:
        """SkippedError where there is less."""
        memory, disk = available_memory() / 1e9, shutil.disk_usage(place).free / 1e9
        for name, wanted, found in (("memory", self.memory, memory), (f"disk in {place.parent}", self.disk, disk)):
            if found < wanted:
                raise SkippedError(f"needs {wanted:g} GB of {name}, of which {found:.1f} GB are free")


@contextmanager
def _compared(benchmark: str, run: RunConfig, quick: bool, needs: Needs) -> Iterator[tuple[Comparison, ...]]:
    torch.set_num_threads(THREADS)
    with TemporaryDirectory() as place:
        if not quick:
            needs.check(Path(place))
        parallel_groups.join()
        groups = parallel_groups.start(run.parallel, run.train.seed)
        try:
            state = _state_of(run, groups)
            ours, theirs = _Ours(state, Path(place) / "ours"), _Theirs(state, Path(place) / "theirs")
            yield _comparisons(benchmark, state, ours, theirs, quick)
        finally:
            parallel_groups.stop()


def _comparisons(
    benchmark: str, state: TrainState, ours: _Ours, theirs: _Theirs, quick: bool
) -> tuple[Comparison, ...]:
    """The saves, with which a pass loads as well; then the loads of the same passes."""
    learning, frozen = _parameters(state)
    case = f"{learning / 1e6:.3g}M parameters that learn in bf16 and {frozen / 1e6:.3g}M frozen ones on one process"
    rounds, warmup = (1, 1) if quick else (5, 1)
    common = partial(Comparison, benchmark=benchmark, target=None, rounds=rounds, tolerance=1e-9)
    return (
        common(
            case=f"{case}; {_bytes(state) / 1e9:.3g} GB until a save is on disk, in the background",
            ours=Side("megavlm, save", ours.next_pass),
            theirs=Side("torch.save", theirs.next_pass),
            warmup=warmup,
            figures=lambda: _figures(ours.passes, _bytes(state) / 1e9),
        ),
        common(
            case=f"{case}; {_bytes(state) / 1e9:.3g} GB loaded, ours with the check of every byte",
            ours=Side("megavlm, load", _replay(ours.passes, warmup)),
            theirs=Side("torch.load", _replay(theirs.passes, warmup)),
            warmup=0,
        ),
    )


@dataclass(frozen=True)
class RoundTrip:
    """Seconds of one save and one load."""

    saved: float
    """Until it is on disk."""
    loaded: float
    checksum: float
    """Of what came back."""
    blocked: float = 0.0
    """For how long the caller of the save waited."""
    checked: float = 0.0
    """The check of the files alone."""
    added: int = 0
    """Bytes of memory that the save took beside the state."""


@dataclass
class _Ours:
    """`--async-save`, then `--load` in the same process."""

    state: TrainState
    folder: Path
    passes: list[RoundTrip] = field(default_factory=list)

    def __post_init__(self) -> None:
        digests = frozen_digests(self.state)  # a run knows them before its first save
        self._manager = CheckpointManager(self.folder, async_save=True, keep_last=1, digests=digests)

    def next_pass(self) -> Pass:
        step = len(self.passes) + 1
        trim_memory()
        with Memory("RssAnon") as memory:
            began = perf_counter()
            blocked = self._manager.save(self.state, step)
            self._manager.finish(self.state)
            saved = perf_counter() - began
        if blocked is None:
            raise NoRowError("checkpoint: a save failed, as said above")
        before = _wiped(self.state)
        place = shelf.checkpoint_path(self.folder, step)
        _forget(place)
        began = perf_counter()
        verify_folders([place], [], self.state.groups.rank, self.state.groups.world_size, self.state.groups.device)
        checked = perf_counter() - began
        _forget(place)
        began = perf_counter()
        self._manager.load_latest(self.state)
        loaded = perf_counter() - began
        added = memory.highest - memory.first
        found = RoundTrip(saved, loaded, _same(self.state, before), blocked / 1000, checked, added)
        self.passes.append(found)
        return Pass(found.saved, found.checksum)


@dataclass
class _Theirs:
    """What a training script does, with the care that makes a save safe: another name first, and a sync."""

    state: TrainState
    folder: Path
    passes: list[RoundTrip] = field(default_factory=list)

    def next_pass(self) -> Pass:
        self.folder.mkdir(exist_ok=True)
        tensors, path = _tensors(self.state), self.folder / "state.pt"
        began = perf_counter()
        partial_path = path.with_suffix(".partial")
        with partial_path.open("wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())
        partial_path.replace(path)
        saved = perf_counter() - began
        before = _wiped(self.state)
        _forget(self.folder)
        began = perf_counter()
        held = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(held[name])
        loaded = perf_counter() - began
        found = RoundTrip(saved, loaded, _same(self.state, before))
        self.passes.append(found)
        return Pass(found.saved, found.checksum)


def _figures(passes: Sequence[RoundTrip], gigabytes: float) -> Sequence[Figure]:
    """What the pairs of times do not say; the first pass, which warms up, apart."""
    first, *later = passes
    return [
        figure("training stands still for a save", "ms", [1000 * one.blocked for one in later]),
        figure("... for the first one, with what is frozen", "ms", [1000 * first.blocked]),
        figure("host memory that a save adds", "GB", [one.added / 1e9 for one in later]),
        figure("writing, until on disk", "GB/s", [gigabytes / one.saved for one in later]),
        figure("the check of every byte", "GB/s", [gigabytes / one.checked for one in later]),
        figure("loading, checked", "GB/s", [gigabytes / one.loaded for one in later]),
    ]


def _replay(passes: Sequence[RoundTrip], warmup: int) -> Callable[[], Pass]:
    """The loads of the passes that have been done, those of the warm-up left out."""
    done: Iterator[RoundTrip] | None = None

    def next_pass() -> Pass:
        nonlocal done
        done = done or iter(passes[warmup:])
        one = next(done)
        return Pass(one.loaded, one.checksum)

    return next_pass


def _state_of(run: RunConfig, groups: Groups) -> TrainState:
    """A run in training, with random moments."""
    model = build_model(run, groups)
    chunks = wrap_data_parallel(list(model.chunks), run.data_parallel)
    optimizer, scheduler = build_optimizer(chunks, run)
    state = train_state(run, model, chunks, optimizer, scheduler, groups)
    generator = torch.Generator(groups.device).manual_seed(1)
    for slot in slots(optimizer).values():
        for name, tensor in slot.tensors.items():
            if name != MASTER:
                tensor.normal_(generator=generator).abs_()
    return state


def _parameters(state: TrainState) -> tuple[int, int]:
    """(those that learn, those that are frozen)"""
    counts = {True: 0, False: 0}
    for part in state.parts:
        for parameter in part.parameters():
            counts[parameter.requires_grad] += parameter.numel()
    return counts[True], counts[False]


def _tensors(state: TrainState) -> Mapping[str, Tensor]:
    """All that a save holds, by name."""
    kept = slots(state.optimizer)
    found = {}
    for chunk in state.chunks:
        for name, parameter in chunk.module.named_parameters():
            if parameter.requires_grad:
                found[name] = parameter.detach()
                found |= {f"{name} {kind}": tensor.detach() for kind, tensor in kept[parameter].tensors.items()}
    return found


def _bytes(state: TrainState) -> int:
    return sum(tensor.nbytes for tensor in _tensors(state).values())


def _wiped(state: TrainState) -> float:
    """Fill the state with zeros; return its sum."""
    total = _sum(state)
    with torch.no_grad():
        for tensor in _tensors(state).values():
            tensor.zero_()
    return total


def _same(state: TrainState, before: float) -> float:
    """The state's sum, which must be what it was, to the last bit."""
    total = _sum(state)
    if total != before:
        raise NoRowError(f"what was loaded ({total!r}) is not what was saved ({before!r})")
    return total


def _sum(state: TrainState) -> float:
    return sum(tensor.sum(dtype=torch.float64).item() for tensor in _tensors(state).values())


def _forget(folder: Path) -> None:
    """Let the page cache drop a folder's files, which are on disk: a load would otherwise read memory."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
