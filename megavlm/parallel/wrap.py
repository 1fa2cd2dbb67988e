"""Data parallelism: model chunks in megatron-core's DDP, and the (distributed) optimizer over them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    ParamKey,
    ParamWithNamePredicate,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from megatron.core.transformer.module import MegatronModule

from megavlm import ranges
from megavlm.config import Config, option, require
from megavlm.model.freeze import Part, part_of
from megavlm.parallel.vision_parallel import finalize_with_vision

PARTS_OF_RATES: dict[str, tuple[Part, ...]] = {
    "tower": ("tower",),
    "connector": ("resampler", "projector", "newline"),
    "cross_attention": ("cross_attention",),
    "decoder": ("decoder",),
}
"""What may have a learning rate of its own, `NAME_lr`."""


@dataclass(frozen=True, kw_only=True)
class DataParallelConfig(Config):
    """How gradients are reduced over the data-parallel ranks."""

    use_distributed_optimizer: bool = True
    """Deal the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs."""
    grad_reduce_in_fp32: bool = option(True, name="--grad-reduce-in-fp32")
    """Accumulate and reduce gradients in float32 whatever the parameters are."""

    def check(self) -> None:
        require(
            self.use_distributed_optimizer or not self.overlap_param_gather,
            self,
            "overlap_param_gather",
            "needs the distributed optimizer",
            "add --use-distributed-optimizer, or drop --overlap-param-gather",
        )
        require(
            self.overlap_grad_reduce or not self.overlap_param_gather,
            self,
            "overlap_param_gather",
            "needs overlap_grad_reduce",
            "add --overlap-grad-reduce",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """AdamW and gradient clipping."""

    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the last step of a cosine or linear decay."""
    lr_decay_style: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate goes down after the warm-up."""
    lr_warmup_iters: int = 0
    """Steps over which the learning rate rises from 0."""
    lr_warmup_fraction: float | None = None
    """The same as a fraction of all steps, rounded up; none: lr_warmup_iters says it."""
    tower_lr: float | None = None
    """Peak learning rate of a trained vision tower, with its lowest in the same proportion; none: that of the rest."""
    connector_lr: float | None = None
    """The same of what stands between tower and decoder: resampler, or projector and newline."""
    cross_attention_lr: float | None = None
    """The same of the gated cross-attention."""
    decoder_lr: float | None = None
    """The same of the decoder."""
    weight_decay: float = 0.1
    """Decoupled weight decay; never on biases and norms."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0 clips nothing."""

    def check(self) -> None:
        require(self.lr > 0, self, "lr", "must be positive", "use for example 1e-4")
        require(0 <= self.min_lr <= self.lr, self, "min_lr", f"is outside [0, {self.lr}]", "use at most lr")
        require(self.lr_warmup_iters >= 0, self, "lr_warmup_iters", "must not be negative", "use 0 for none")
        self._check_warmup_fraction()
        for name in PARTS_OF_RATES:
            rate = getattr(self, f"{name}_lr")
            require(
                rate is None or rate > 0, self, f"{name}_lr", "must be positive", "use for example 2e-6, or freeze it"
            )
        require(self.weight_decay >= 0, self, "weight_decay", "must not be negative", "use 0 for none")
        require(self.clip_grad >= 0, self, "clip_grad", "must not be negative", "use 0 for none")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, self, name, "is outside [0, 1)", "use for example 0.9")
        require(self.adam_eps > 0, self, "adam_eps", "must be positive", "use for example 1e-8")

    def _check_warmup_fraction(self) -> None:
        if self.lr_warmup_fraction is None:
            return
        name = "lr_warmup_fraction"
        require(0 <= self.lr_warmup_fraction < 1, self, name, "is outside [0, 1)", "use for example 0.03")
        problem = f"stands beside lr_warmup_iters ({self.lr_warmup_iters})"
        require(self.lr_warmup_iters == 0, self, name, problem, "use none, or set lr_warmup_iters to 0")

    @property
    def rates(self) -> dict[str, tuple[float, float]]:
        """(highest, lowest) learning rate by the names of PARTS_OF_RATES, of those that have one of their own."""
        own = {name: getattr(self, f"{name}_lr") for name in PARTS_OF_RATES}
        return {name: (rate, self.min_lr * rate / self.lr) for name, rate in own.items() if rate is not None}

    def warmup_steps(self, train_iters: int) -> int:
        """Steps of the warm-up of a run of so many."""
        if self.lr_warmup_fraction is None:
            return self.lr_warmup_iters
        # As a decimal: 0.03 of 100 steps is 3, and no float's 3.0000000000000004 makes it 4.
        return math.ceil(Fraction(str(self.lr_warmup_fraction)) * train_iters)


def _is_in(parts: tuple[Part, ...], parameter: torch.nn.Parameter, name: str) -> bool:
    """Whether it is of one of these parts, by its name in a wrapped chunk."""
    return part_of(name.removeprefix("module.")) in parts


def wrap_data_parallel(chunks: list[MegatronModule], config: DataParallelConfig) -> list[DistributedDataParallel]:
    """Each pipeline chunk in its DDP; gradients are then finalised by megatron-core at the end of a schedule."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.grad_reduce_in_fp32,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        use_distributed_optimizer=config.use_distributed_optimizer,
    )
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            ddp_config,
            chunk,
            # Only the first chunk's backward comes last, so only its reduction is worth cutting into buckets.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    _connect(wrapped, config)
    return wrapped


def _connect(wrapped: list[DistributedDataParallel], config: DataParallelConfig) -> None:
    """Tell the schedules (through the chunks' shared TransformerConfig) how gradients and parameters are synced."""
    transformer = wrapped[0].config
    transformer.finalize_model_grads_func = finalize_with_vision(wrapped[0].tp_group)

    def one_or_all(functions: list[Any]) -> Any:
        return functions[0] if len(functions) == 1 else functions

    if config.overlap_grad_reduce:
        transformer.no_sync_func = one_or_all([chunk.no_sync for chunk in wrapped])
    if config.overlap_param_gather:
        transformer.param_sync_func = one_or_all([chunk.start_param_sync for chunk in wrapped])


def gather_parameters(chunks: list[DistributedDataParallel]) -> None:
    """Bring every rank's parameters up to date: when their gather overlaps, it waits for a forward pass to come."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def make_optimizer(
    chunks: list[DistributedDataParallel],
    config: OptimizerConfig,
    data_parallel: DataParallelConfig,
    dtype: torch.dtype,
) -> MegatronOptimizer:
    """AdamW over all trainable parameters; with float32 master weights where the parameters are bf16."""
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=data_parallel.use_distributed_optimizer,
        overlap_param_gather=data_parallel.overlap_param_gather,
    )
    overrides = get_standard_config_overrides(megatron_config)
    for name, (highest, lowest) in config.rates.items():
        is_in = ParamWithNamePredicate(name=name, fn=partial(_is_in, PARTS_OF_RATES[name]))
        overrides[ParamKey(with_name_predicate=is_in)] = ParamGroupOverride(max_lr=highest, min_lr=lowest)
    optimizer = get_megatron_optimizer(megatron_config, chunks, overrides, use_gloo_process_groups=False)
    assert isinstance(optimizer, ChainedOptimizer), "of dense models always"
    for group in optimizer.param_groups:
        # Only torch's AdamW has this switch, off where it is not asked for: a loop of single operations then takes six
        # times as long on a CPU. Transformer Engine's and apex's AdamW are fused anyway.
        if "fused" in group:
            group["fused"] = True
    return optimizer


@ranges.named("gradient norm")
@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """The norm of the whole gradient, which this also hands to the optimizer; the same on every rank."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@ranges.named("optimizer")
@torch.no_grad()
def update_weights(optimizer: MegatronOptimizer, norm: float) -> None:
    """Clip what `gradient_norm` handed over, and step.

    megatron-core's own `step` does all three at once, and so changes the weights whatever the norm is.
    """
    assert isinstance(optimizer, ChainedOptimizer)
    for one in optimizer.chained_optimizers:
        parameters = [] if one.is_stub_optimizer else one.get_parameters()
        if parameters and one.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, one.config.clip_grad, norm)
    optimizer.step_with_ready_grads()
