"""What a run waits for beside its own computation: data, and saves in the background.

A model of about 20M parameters trains on toy pictures, prepared as a user's data are, in two runs that take turns: one
saves every 50 steps with `--async-save`, the other never does. A pass is 50 steps, the first of which ends with the
save, so that all of its writing falls into the pass. Waiting for data is measured in the run that never saves: its
passes as they were against the same passes less the time in which the loop stood waiting.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

from megavlm.bench.data_path import write_tokenizer
from megavlm.bench.harness import THREADS, Comparison, Pass, Side
from megavlm.build.loader import build_words
from megavlm.build.run_config import CheckpointConfig, RunConfig, SiglipConfig
from megavlm.data.shards import write_shards
from megavlm.data.token_counts import add_token_counts
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.toy_world.samples import toy_samples
from megavlm.data.toy_world.world import SampleKind
from megavlm.parallel import groups as parallel_groups
from megavlm.parallel.groups import Groups
from megavlm.recipes import recipe
from megavlm.train.feed import feed
from megavlm.train.loop import timed
from megavlm.train.training import build_training

WAITING_TARGET, SAVING_TARGET = 1 / 0.98, 1.03
"""At most 2 % of the time for data, and at most 3 % more time for saves."""
KINDS: tuple[SampleKind, ...] = ("chat", "multi_image", "text")
STEPS = 50
SAMPLES_PER_STEP = 4


@contextmanager
def stalls(quick: bool) -> Iterator[tuple[Comparison, ...]]:
    """Both runs in this process; first the comparison of saves, on whose passes that of waiting rests."""
    torch.set_num_threads(THREADS)
    steps = 3 if quick else STEPS
    rounds = 1 if quick else 4
    parallel_groups.join()
    with TemporaryDirectory() as place:
        run = _toy_run(Path(place), quick)
        groups = parallel_groups.start(run.parallel, run.train.seed)
        saves = CheckpointConfig(save_to=f"{place}/saved", save_interval=steps, async_save=True, keep_last=1)
        saving, plain = (_Run(one, groups, steps) for one in (run.replace(checkpoint=saves), run))
        case = f"{plain.parameters / 1e6:.1f}M Aquila-VL, {SAMPLES_PER_STEP} toy samples a step, {steps} steps a pass"
        saved = Comparison(
            benchmark="stalls",
            case=f"{case}: a save in the background every {steps} steps",
            ours=Side("saving", saving.next_pass),
            theirs=Side("not saving", plain.next_pass),
            target=SAVING_TARGET,
            rounds=rounds,
            warmup=0,  # the steps in front of the first pass have warmed up
        )
        waited = Comparison(
            benchmark="stalls",
            case=f"{case}: waiting for data",
            ours=Side("as it is", _replay(plain, lambda segment: segment.seconds)),
            theirs=Side("less waiting", _replay(plain, lambda segment: segment.seconds - segment.waited)),
            target=WAITING_TARGET,
            rounds=rounds,
            warmup=0,  # the steps in front of the first pass have warmed up
        )
        try:
            yield saved, waited
            blocked = ", ".join(f"{one:.0f}" for one in saving.blocked)
            print(f"stalls: milliseconds that training stood still for each save: {blocked}")
            share = statistics.median(segment.waited / segment.seconds for segment in plain.segments)
            print(f"stalls: waiting for data took {100 * share:.2f} % of the time")
        finally:
            saving.close()
            plain.close()
            parallel_groups.stop()


@dataclass(frozen=True)
class Segment:
    """Some steps of a run."""

    seconds: float
    waited: float
    loss: float


class _Run:
    """A run that does some steps when it is asked to."""

    def __init__(self, run: RunConfig, groups: Groups, steps: int) -> None:
        self._training = build_training(run, groups)
        self._feed = feed(run, self._training.model, groups, 0)
        self._fed = timed(self._feed)
        self._steps = steps
        self.segments: list[Segment] = []
        self.blocked: list[float] = []
        for _ in range(steps - 1):  # passes begin with a step that is saved
            self._step()

    @property
    def parameters(self) -> int:
        return sum(p.numel() for part in self._training.model.parts() for p in part.parameters())

    def next_pass(self) -> Pass:
        began = perf_counter()
        found = [self._step() for _ in range(self._steps)]
        self._training.checkpointing.wait()
        seconds = perf_counter() - began
        loss = statistics.mean(loss for _, loss in found)
        self.segments.append(Segment(seconds, sum(waited for waited, _ in found), loss))
        return Pass(seconds, loss)

    def _step(self) -> tuple[float, float]:
        """(seconds that it waited, its loss)."""
        waited, step = next(self._fed)
        loss = self._training.step(step, 0).loss
        blocked = self._training.checkpointing.after_step(step.iteration)
        if blocked is not None:
            self.blocked.append(blocked)
        return waited, loss

    def close(self) -> None:
        """End the threads that read ahead."""
        for steps in (self._fed, self._feed):
            assert isinstance(steps, Generator)
            steps.close()


def _replay(run: _Run, seconds: Callable[[Segment], float]) -> Callable[[], Pass]:
    """The passes that a run has done, once more."""
    segments = iter(run.segments)

    def next_pass() -> Pass:
        segment = next(segments)
        return Pass(seconds(segment), segment.loss)

    return next_pass


def _toy_run(root: Path, quick: bool) -> RunConfig:
    """A stage of a toy Aquila-VL in which all learns, on pictures prepared below this folder."""
    write_tokenizer(root / "tokenizer")
    tokenizer = Tokenizer(root / "tokenizer")
    image, video = tokenizer.token_of("<image>"), tokenizer.token_of("<video>")
    run = recipe("aquila-vl-tiny/2a")
    assert run.data is not None and run.aquila_vl is not None and image is not None and video is not None
    parts = run.aquila_vl.replace(image_token_id=image, video_token_id=video)
    decoder = run.decoder
    if not quick:
        tower = SiglipConfig(image_size=56, patch_size=8, width=288, depth=6, heads=4, mlp_width=1152)
        parts = parts.replace(tower=tower, grid=parts.grid.replace(patch_size=tower.patch_size))
        heads = {"num_attention_heads": 6, "num_query_groups": 2, "kv_channels": 64}
        decoder = decoder.replace(num_layers=8, hidden_size=384, ffn_hidden_size=1024, **heads)
    (samples,) = run.data.streams
    sources = tuple(source.replace(part=0, parts=1) for source in samples.sources)
    samples = samples.replace(sources=sources, samples_per_step=SAMPLES_PER_STEP)
    data = run.data.replace(path=str(root), tokenizer=str(root / "tokenizer"), streams=(samples,))
    data = data.replace(rows=data.rows.replace(rows_multiple=1))
    train = run.train.replace(train_iters=1_000_000)
    run = run.replace(decoder=decoder, aquila_vl=parts, data=data, train=train)
    words = build_words(run)
    for kind in KINDS:
        write_shards([list(toy_samples(kind, "train", 0, 8 if quick else 200))], root / f"toy-{kind}")
        add_token_counts(root / f"toy-{kind}", words.count, words.name, words.hash)
    return run
