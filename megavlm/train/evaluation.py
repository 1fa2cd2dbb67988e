"""The loss on held-out data, in between the steps of training, which are the same with it and without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from megavlm.checkpoint.atomic import replace_file
from megavlm.checkpoint.fp8_scales import scales_kept
from megavlm.log import get_logger
from megavlm.parallel.agree import said_by_first
from megavlm.parallel.schedule import GlobalLoss, forward_loss
from megavlm.train.feed import FedStep, held_out
from megavlm.train.step import Sources, named_losses, token_groups
from megavlm.train.stopping import Stopping
from megavlm.train.training import Training

logger = get_logger(__name__)

EVALUATED_FILE = "latest_evaluated_iteration.txt"


class Evaluation:
    """Reads the same global batches each time; nothing where the run's settings ask for none.

    A file beside the checkpoints says what was evaluated last, so that a run which was stopped ahead of an evaluation
    makes it up when it goes on.
    """

    def __init__(self, training: Training, stopping: Stopping) -> None:
        self._training, self._stopping = training, stopping
        self._settings = training.run.train
        self._batches = held_out(training.run, training.model, training.groups)
        folder = training.run.checkpoint.save_to
        self._mark = None if folder is None else Path(folder) / EVALUATED_FILE

    def lacks(self, iteration: int) -> bool:
        """Whether the run has come to this step and saved it without the evaluation that is due there; a collective."""
        if self._mark is None or iteration == 0 or not self._is_due(iteration):
            return False
        return said_by_first(_number_in(self._mark) != iteration)

    def _is_due(self, iteration: int) -> bool:
        interval = self._settings.eval_interval
        return interval is not None and (iteration % interval == 0 or iteration >= self._settings.train_iters)

    def after_step(self, iteration: int) -> tuple[Mapping[str, float] | None, str | None]:
        """(the losses, if it is time; why the run is to stop, if it was asked to meanwhile: then without losses)."""
        if not self._is_due(iteration):
            return None, None
        found = MeanLosses()
        with evaluating(self._training.chunks):
            for step in self._batches():
                found.add(self._loss(step), step.sources)
                stopped = self._stopping.agreed()
                if stopped:
                    return None, stopped
        self._note(iteration)
        return found.means(), None

    def _note(self, iteration: int) -> None:
        if self._mark is None or self._training.groups.rank != 0:
            return
        try:
            self._mark.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._mark, f"{iteration}\n".encode())
        except OSError as error:
            logger.warning("%s cannot be written (%s): a restart would evaluate again", self._mark, error.strerror)

    def _loss(self, step: FedStep) -> GlobalLoss:
        training, apart = self._training, token_groups(step.sources)
        return forward_loss(training.chunks, step.batches, training.groups, training.model.inputs, apart)


def _number_in(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


class MeanLosses:
    """Means over several global batches, weighted by their target tokens."""

    def __init__(self) -> None:
        self._loss, self._tokens = 0.0, 0
        self._apart: dict[str, tuple[float, int]] = {}

    def add(self, found: GlobalLoss, sources: Sources | None) -> None:
        """A global batch's."""
        self._loss += found.loss * found.target_tokens
        self._tokens += found.target_tokens
        names: Sequence[str] = () if sources is None else sources.names
        for name, (total, tokens) in zip(names, found.of_groups, strict=False):
            so_far, counted = self._apart.get(name, (0.0, 0))
            self._apart[name] = so_far + total, counted + tokens

    def means(self) -> Mapping[str, float]:
        """As `StepReport` names them."""
        whole = GlobalLoss(self._loss / max(1, self._tokens), self._tokens, list(self._apart.values()), None)
        return named_losses(whole, list(self._apart))


@contextmanager
def evaluating(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Without dropout, which would also move the generators, and without a trace in the scales of FP8."""
    modes = {module: module.training for chunk in chunks for module in chunk.modules()}
    try:
        for module in modes:
            module.training = False
        with scales_kept(chunks, chunks[0].config):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
