"""Small runs of every family to save and go on with: a step's data is a function of its number."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from tiny_aquila import GRIDS, IMAGE, save_tiny, tiny_config
from torch import Tensor

from megavlm.batch import AttendedMedia, TextBatch, next_token_batch, preceding_images
from megavlm.build.from_folder import run_from_folder
from megavlm.build.model import Model, build_model
from megavlm.build.run_config import DataParallelConfig, OptimizerConfig, ParallelConfig, PrecisionConfig, RunConfig
from megavlm.checkpoint.generators import generator_states
from megavlm.checkpoint.optimizer_state import slots, steps_taken
from megavlm.checkpoint.state import TrainState
from megavlm.data.assemble_tables import spliced_batch
from megavlm.parallel import groups as process_groups
from megavlm.parallel.wrap import wrap_data_parallel
from megavlm.recipes import recipe
from megavlm.tiles import plan_image
from megavlm.train.checkpointing import train_state
from megavlm.train.optim import build_optimizer
from megavlm.train.step import train_step

INFIMM_FOLDER = Path(__file__).parents[1] / "fixtures" / "infimm_zephyr_tiny"
ROWS = 4
TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = {**TP2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
INTERLEAVED = {**PP2, "virtual_pipeline_model_parallel_size": 2}
DISTRIBUTED = DataParallelConfig()
PLAIN = DataParallelConfig(use_distributed_optimizer=False)
OVERLAPPED = DataParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)

FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "decoder": ("decoder", ("decoder",)),
    "infimm": ("infimm", ("cross_attention", "resampler", "new_tokens")),
    "infimm, all": ("infimm", ("cross_attention", "resampler", "decoder")),
    "aquila_vl": ("aquila_vl", ("projector", "newline", "tower", "decoder")),
    "aquila_vl, stage 1": ("aquila_vl", ("projector",)),
}
"""Name -> the model, and the parts of it that learn."""


def aquila_folder(folder: Path, seed: int = 0) -> Path:
    """The weights that runs of Aquila-VL start from."""
    save_tiny(folder, tiny_config(GRIDS["2b"]), seed)
    return folder


def run_of(
    family: str,
    weights: Path,
    degrees: dict[str, Any],
    data_parallel: DataParallelConfig = DISTRIBUTED,
    dtype: Any = "float32",
    dropout: float = 0.0,
) -> RunConfig:
    """`weights` is the folder of Aquila-VL's."""
    model, trainable = FAMILIES[family]
    if model == "decoder":
        run = recipe("decoder-tiny-qwen2")
    else:
        run = run_from_folder(INFIMM_FOLDER if model == "infimm" else weights)
    return run.replace(
        decoder=run.decoder.replace(hidden_dropout=dropout),
        trainable=trainable,
        parallel=ParallelConfig(**degrees),
        data_parallel=data_parallel,
        precision=PrecisionConfig(params_dtype=dtype),
        optimizer=OptimizerConfig(lr=1e-2, lr_decay_style="cosine", lr_warmup_iters=2),
        train=run.train.replace(train_iters=20, global_batch_size=ROWS, micro_batch_size=1, seq_length=16),
        make_vocab_size_divisible_by=2,
    )


@dataclass
class Live:
    """A run that has been started on this rank."""

    run: RunConfig
    groups: process_groups.Groups
    model: Model
    chunks: list[DistributedDataParallel]
    state: TrainState

    def steps(self, first: int, last: int) -> list[float]:
        """Losses of the steps [first, last); 0 on all but the last pipeline stage."""
        return [self.step(number) for number in range(first, last)]

    def step(self, number: int) -> float:
        mine = range(self.groups.data_rank, ROWS, self.groups.data_size)
        batches = [row_of(self.run, 100 * number + row) for row in mine]
        result = train_step(self.chunks, self.state.optimizer, batches, self.groups, self.model.inputs)
        self.state.scheduler.step(increment=1)
        return result.loss


def start(run: RunConfig) -> Live:
    """Build everything afresh, whatever ran before."""
    process_groups.stop()
    groups = process_groups.start(run.parallel, run.train.seed)
    model = build_model(run, groups)
    chunks = wrap_data_parallel(list(model.chunks), run.data_parallel)
    optimizer, scheduler = build_optimizer(chunks, run)
    return Live(run, groups, model, chunks, train_state(run, model, chunks, optimizer, scheduler, groups))


def row_of(run: RunConfig, seed: int) -> TextBatch:
    if run.infimm is not None:
        return infimm_row(run, seed % 3, seed)
    if run.aquila_vl is not None:
        return _aquila_row(run, seed)
    tokens = torch.randint(0, run.decoder.vocab_size, (1, 16), generator=torch.Generator().manual_seed(seed))
    return next_token_batch(tokens)


def infimm_row(run: RunConfig, images: int, seed: int) -> TextBatch:
    """A row of eight tokens with images of noise."""
    assert run.infimm is not None
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 100, (1, 8), generator=generator)
    tokens[0, 1 : 2 * images + 1 : 2] = run.infimm.image_token_id
    tower = run.infimm.tower
    patches = torch.randn(images * tower.patches, tower.patch_values, generator=generator)
    image_of_token, has_image = preceding_images(tokens, run.infimm.image_token_id, [images])
    text = next_token_batch(tokens)
    media = AttendedMedia(patches, (1,) * images, image_of_token=image_of_token, has_image=has_image)
    return TextBatch(text.tokens, text.labels, text.loss_weights, media=media)


def _aquila_row(run: RunConfig, seed: int) -> TextBatch:
    """A row with an image of noise, cut into a grid, or without one."""
    assert run.aquila_vl is not None
    grid, generator = run.aquila_vl.grid, torch.Generator().manual_seed(seed)
    plans = [plan_image(120, 60, "image", grid)] * (seed % 2)
    tokens = torch.randint(0, 100, (5,), generator=generator).tolist()
    tokens += [IMAGE] * sum(plan.tokens for plan in plans)
    tokens += torch.randint(0, 100, (240 - len(tokens),), generator=generator).tolist()
    patches = torch.randn(sum(plan.patch_rows for plan in plans), 3 * grid.patch_size**2, generator=generator)
    row = torch.tensor([tokens])
    is_image = row == IMAGE
    return spliced_batch(row, row.masked_fill(is_image, -100), is_image.numpy(), plans, patches, None)


def fingerprint(live: Live) -> dict[str, Tensor]:
    """All that this rank's next steps depend on."""
    found = {f"weight {n}": p.detach().clone() for part in live.model.parts() for n, p in part.named_parameters()}
    for number, slot in enumerate(slots(live.state.optimizer).values()):
        found |= {f"slot {number} {name}": tensor.detach().clone() for name, tensor in slot.tensors.items()}
    for part in live.model.parts():
        for name, module in part.named_modules():
            kept = module.get_fp8_meta_tensors() if hasattr(module, "get_fp8_meta_tensors") else None
            found |= {
                f"{way} {name} {i}": tensor for way, both in (kept or {}).items() for i, tensor in enumerate(both)
            }
    found |= {f"generator {n}": state.clone() for n, state in generator_states(live.groups.device).items()}
    counts = [steps_taken(live.state.optimizer), live.state.scheduler.num_steps]
    rates = [group["lr"] for group in live.state.optimizer.param_groups]
    return {**found, "counts": torch.tensor(counts), "rates": torch.tensor(rates, dtype=torch.float64)}


def assert_same_bits(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name


def saved_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole; without generators, which belong to a layout."""
    found = dist_checkpointing.load_plain_tensors(str(checkpoint))
    return {n: t for n, t in found.items() if isinstance(t, Tensor) and not n.startswith("generators.")}


def assert_same_tensors(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit; the vocabulary's padding may differ in length, and is zero."""
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        rows = min(tensor.size(0), other[name].size(0))
        assert torch.equal(tensor[:rows], other[name][:rows]), name
        assert not tensor[rows:].any() and not other[name][rows:].any(), name
