"""Everything that decides a run, in one typed object, and what can be refused before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, field

from megavlm.build.log_config import LogConfig
from megavlm.checkpoint.manager import CheckpointConfig
from megavlm.config import Config, require
from megavlm.data.chat import ChatConfig
from megavlm.data.order import OverLong, SourceConfig, StreamConfig
from megavlm.data.packing import PackLimits
from megavlm.data.step_plan import DataConfig
from megavlm.errors import LayoutError
from megavlm.model.aquila_vl.config import AquilaVLConfig
from megavlm.model.backend import Implementation
from megavlm.model.cross_attention import CrossAttentionConfig
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.freeze import PARTS_OF_AQUILA_VL, PARTS_OF_INFIMM, Part
from megavlm.model.infimm.config import InfiMMConfig
from megavlm.model.precision import PrecisionConfig, check_fp8_rows
from megavlm.model.resampler import ResamplerConfig
from megavlm.model.towers.eva_config import EvaConfig, eva_tower
from megavlm.model.towers.siglip_config import SIGLIP_SO400M, SiglipConfig
from megavlm.parallel.layout import ParallelConfig, check_layout, nearest_degrees
from megavlm.parallel.recompute import RecomputeConfig
from megavlm.parallel.wrap import PARTS_OF_RATES, DataParallelConfig, OptimizerConfig

__all__ = [
    "SIGLIP_SO400M",
    "AquilaVLConfig",
    "ChatConfig",
    "CheckpointConfig",
    "CrossAttentionConfig",
    "DataConfig",
    "DataParallelConfig",
    "DecoderConfig",
    "EvaConfig",
    "InfiMMConfig",
    "LogConfig",
    "OptimizerConfig",
    "OverLong",
    "PackLimits",
    "ParallelConfig",
    "Part",
    "PrecisionConfig",
    "RecomputeConfig",
    "ResamplerConfig",
    "RunConfig",
    "SiglipConfig",
    "SourceConfig",
    "StreamConfig",
    "TrainConfig",
    "WeightsConfig",
    "check_degrees",
    "check_for_world",
    "eva_tower",
]


TOY_ROWS, TOY_TOKENS = 8, 512
"""The batch of toy text, and the length of its rows, where no others are asked for."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """How long and on how much a run trains."""

    train_iters: int = 100
    """Optimizer steps."""
    global_batch_size: int | None = None
    """Samples a step, over all data-parallel ranks; none: as many as the streams of the data have together, and of toy
    text 8 rows. Another number than that of the streams is refused: data.streams.0.samples_per_step changes it."""
    micro_batch_size: int = 1
    """Rows of toy text that pass through the model at once; of prepared data it is one row, of packed samples."""
    seq_length: int | None = None
    """Tokens a row; none: data.rows.max_tokens, which decides for prepared data, and of toy text 512."""
    seed: int = 1234
    """Seed of fresh weights, data and dropout."""
    log_interval: int = 1
    """Steps between two log lines."""
    eval_interval: int | None = None
    """Steps between two evaluations on held-out data (`--valid-data-path`), with one at the end; none: no evaluation.
    It changes nothing of the training."""
    eval_iters: int = 10
    """Global batches of held-out data in each evaluation, the same ones each time."""
    max_nan_iterations: int = 3
    """Steps in a row whose loss or gradient may be not finite, each left out, before the run stops."""
    exit_duration_in_mins: float | None = None
    """Minutes from the start of the process behind which the run saves, and ends with exit code 75; none: no limit."""
    exit_interval: int | None = None
    """The run saves and ends, with exit code 75, behind each step that this divides; none: it runs to its end."""
    images_per_row: float = 1.0
    """What the tower sees of a row on average, by which `--pipeline-model-parallel-layout auto` weighs it: images; of
    Aquila-VL tiles, of which an image has several."""

    def check(self) -> None:
        for name in (
            "train_iters",
            "global_batch_size",
            "micro_batch_size",
            "log_interval",
            "eval_iters",
            "max_nan_iterations",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, self, name, "must be at least 1", "use a positive number")
        for name in ("eval_interval", "exit_duration_in_mins", "exit_interval"):
            value = getattr(self, name)
            require(value is None or value > 0, self, name, "must be above 0", "use a positive number, or leave it out")
        require(self.images_per_row >= 0, self, "images_per_row", "must not be negative", "use 0 for text alone")
        require(0 <= self.seed < 2**62, self, "seed", "is no seed", "use a number from 0 to 2**62")
        length = self.seq_length
        require(length is None or length >= 2, self, "seq_length", "leaves nothing to predict", "use at least 2")


@dataclass(frozen=True, kw_only=True)
class WeightsConfig(Config):
    """Where weights come from and go to."""

    load_hf: str | None = None
    """Hugging Face folder to start from; none draws fresh weights from the seed."""
    pretrained_checkpoint: str | None = None
    """Folder that --save of another run has filled, or one checkpoint in it, to start from its weights alone: with an
    optimizer, a schedule and a step of one's own, whatever was trained there and under whatever layout."""
    export_hf: str | None = None
    """Hugging Face folder to write at the end."""

    def check(self) -> None:
        for name in ("load_hf", "pretrained_checkpoint", "export_hf"):
            require(getattr(self, name) != "", self, name, "is empty", "name a folder, or leave it out")
        require(
            self.load_hf is None or self.pretrained_checkpoint is None,
            self,
            "pretrained_checkpoint",
            f"stands beside load_hf ({self.load_hf}), and weights come from one place",
            "leave one of them out; --tokenizer names the folder of a tokenizer alone",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """One training run."""

    name: str
    """The recipe's name."""
    decoder: DecoderConfig
    """The decoder's shape."""
    infimm: InfiMMConfig | None = None
    """InfiMM's parts around the decoder; none: a decoder alone."""
    aquila_vl: AquilaVLConfig | None = None
    """Aquila-VL's parts around the decoder."""
    trainable: tuple[Part, ...] = ("decoder", "cross_attention", "resampler")
    """The parts that learn; all others are frozen. Of InfiMM, whose tower is always frozen: resampler,
    cross_attention, decoder, and new_tokens, the two new rows of a frozen decoder's vocabulary. Of Aquila-VL: tower,
    projector, newline (where images are cut into a grid), decoder."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Degrees of parallelism."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    """Activation recompute."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Number formats."""
    data_parallel: DataParallelConfig = field(default_factory=DataParallelConfig)
    """Gradient reduction."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and the learning rate over the steps."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length and batch."""
    data: DataConfig | None = None
    """What is read; none: toy text, of `train.seq_length` tokens a row."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """Folders of weights."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """The state of training on disk."""
    log: LogConfig = field(default_factory=LogConfig)
    """What the run tells of itself."""
    transformer_impl: Implementation = "auto"
    """Whose layers: Transformer Engine's, megatron-core's local ones, or auto (the former where installed)."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times the tensor-parallel ranks."""

    @property
    def samples_per_step(self) -> int:
        """The global batch: samples of prepared data, or rows of toy text."""
        return self.data.samples_per_step if self.data else self.train.global_batch_size or TOY_ROWS

    @property
    def row_tokens(self) -> int:
        """Tokens of a row: the most of prepared data, all of toy text."""
        return self.data.rows.max_tokens if self.data else self.train.seq_length or TOY_TOKENS

    @property
    def tokenizer_folder(self) -> str | None:
        """Where the tokenizer lies: the folder that the data settings name, or else that of the weights."""
        return (self.data and self.data.tokenizer) or self.weights.load_hf

    def check(self) -> None:
        require(
            "new_tokens" not in self.trainable or (self.infimm is not None and "decoder" not in self.trainable),
            self,
            "trainable",
            "has rows of their own for the new tokens, which only InfiMM with a frozen decoder needs",
            "leave out new_tokens (a trained decoder learns them anyway), or decoder",
        )
        longest = self.decoder.longest_text
        is_window = longest == self.decoder.sliding_window
        require(
            self.data is not None or self.row_tokens <= longest,
            self,
            "train.seq_length",
            f"is longer than the decoder's {'sliding window' if is_window else 'positions'} of {longest}",
            f"use at most {longest}",
        )
        require(
            "new_tokens" not in self.trainable or not self.decoder.tied_embeddings,
            self,
            "trainable",
            "has new_tokens, whose two pairs of rows a tied embedding cannot hold",
            "leave new_tokens out, or train the decoder",
        )
        require(
            self.infimm is None or self.aquila_vl is None,
            self,
            "aquila_vl",
            "stands beside infimm, and a model is of one family",
            "leave one of them out",
        )
        require(
            "tower" not in self.trainable or self.parallel.vision_over == "first_stage",
            self,
            "trainable",
            "has the tower, which then cannot be encoded ahead by all stages",
            "use parallel.vision_over first_stage, or freeze the tower",
        )
        self._check_rates()
        self._check_evaluation()
        self._check_batch()
        parts = PARTS_OF_INFIMM if self.infimm else PARTS_OF_AQUILA_VL if self.aquila_vl else ("decoder",)
        require(
            any(part in parts for part in self.trainable),
            self,
            "trainable",
            "names no part of this model, so nothing would learn",
            f"use {' or '.join(parts)}",
        )
        require(
            self.make_vocab_size_divisible_by >= 1,
            self,
            "make_vocab_size_divisible_by",
            "must be at least 1",
            "use 128",
        )

    def _check_rates(self) -> None:
        for name in self.optimizer.rates:
            parts = PARTS_OF_RATES[name]
            require(
                any(part in self.trainable for part in parts),
                self,
                f"optimizer.{name}_lr",
                f"is for a trained {name.replace('_', '-')}, and this run's is frozen",
                f"leave --{name.replace('_', '-')}-lr out, or name {' or '.join(parts)} among --trainable",
            )

    def _check_batch(self) -> None:
        """What prepared data decide is not said a second time, in another number."""
        if self.data is None:
            return
        of_streams = [(stream.name, stream.samples_per_step) for stream in self.data.streams]
        said = ", ".join(f"{name} {samples}" for name, samples in of_streams)
        places = " and ".join(f"data.streams.{place}.samples_per_step" for place in range(len(of_streams)))
        require(
            self.train.global_batch_size in (None, self.samples_per_step),
            self,
            "train.global_batch_size",
            f"is not the {self.samples_per_step} samples a step that the data's streams have together ({said})",
            f"leave it out, and set {places} for another batch",
        )
        require(
            self.train.micro_batch_size == 1,
            self,
            "train.micro_batch_size",
            "is for toy text: of prepared data one row, packed with samples, passes through the model at once",
            f"leave it out, and set data.rows.max_tokens ({self.row_tokens}) for other rows",
        )
        require(
            self.train.seq_length in (None, self.row_tokens),
            self,
            "train.seq_length",
            f"is not the {self.row_tokens} tokens that a row of the data may have",
            "leave it out, and set data.rows.max_tokens for longer or shorter rows",
        )

    def _check_evaluation(self) -> None:
        if self.data is None:
            return
        is_there, is_asked_for = self.data.valid_path is not None, self.train.eval_interval is not None
        remedy = "give --valid-data-path as well, or leave --eval-interval out"
        require(is_there or not is_asked_for, self, "train.eval_interval", "has no held-out data", remedy)
        remedy = "give --eval-interval as well, or leave --valid-data-path out"
        require(is_asked_for or not is_there, self, "data.valid_path", "is never evaluated on", remedy)


def check_degrees(run: RunConfig, world_size: int) -> None:
    """Refuse a model that cannot be laid out over `world_size` processes."""
    check_layout(run.parallel, run.decoder, world_size)
    tensor = run.parallel.tensor_model_parallel_size
    if run.infimm is not None and run.infimm.cross_attention.heads % tensor:
        heads = run.infimm.cross_attention.heads
        raise LayoutError(
            "parallel.tensor_model_parallel_size",
            tensor,
            f"does not divide the {heads} heads of the gated cross-attention",
            f"use {' or '.join(map(str, nearest_degrees(tensor, lambda degree: heads % degree == 0)))}",
        )


def check_for_world(run: RunConfig, world_size: int) -> None:
    """Refuse a run that cannot be laid out over `world_size` processes, its batch included."""
    check_degrees(run, world_size)
    data_ranks = world_size // run.parallel.model_parallel_size
    if run.data is None:
        _check_toy_rows(run, data_ranks)
    else:
        _check_packed_rows(run, run.data, data_ranks)


def _check_packed_rows(run: RunConfig, data: DataConfig, data_ranks: int) -> None:
    tensor, stages = run.parallel.tensor_model_parallel_size, run.parallel.pipeline_model_parallel_size
    if run.parallel.sequence_parallel and data.rows.length_multiple % tensor:
        raise LayoutError(
            "data.rows.length_multiple",
            data.rows.length_multiple,
            f"sequence parallelism over {tensor} ranks does not divide it",
            f"use a multiple of {tensor}, or drop --sequence-parallel",
        )
    slices = tensor if run.parallel.sequence_parallel else 1
    check_fp8_rows(run.precision, "data.rows.length_multiple", data.rows.length_multiple, slices)
    longest = run.decoder.longest_text
    if data.rows.max_tokens > longest:
        raise LayoutError(
            "data.rows.max_tokens",
            data.rows.max_tokens,
            f"is longer than the decoder's {longest} positions",
            f"use at most {longest}",
        )
    multiple = data.rows.rows_multiple
    at_once = data_ranks * (stages if run.parallel.virtual_pipeline_model_parallel_size > 1 else 1)
    if multiple % at_once:
        of_stages = "" if at_once == data_ranks else f" times the {stages} stages of the interleaved schedule"
        raise LayoutError(
            "data.rows.rows_multiple",
            multiple,
            f"{data_ranks} data-parallel ranks{of_stages} do not divide it",
            f"use a multiple of {at_once}, such as {-(-multiple // at_once) * at_once}",
        )


def _check_toy_rows(run: RunConfig, data_ranks: int) -> None:
    tensor = run.parallel.tensor_model_parallel_size
    if run.parallel.sequence_parallel and run.row_tokens % tensor:
        raise LayoutError(
            "train.seq_length",
            run.row_tokens,
            f"sequence parallelism over {tensor} ranks does not divide it",
            f"use {run.row_tokens // tensor * tensor or tensor}, or drop --sequence-parallel",
        )
    slices = tensor if run.parallel.sequence_parallel else 1
    check_fp8_rows(run.precision, "train.seq_length", run.row_tokens, slices)
    at_once = run.train.micro_batch_size * data_ranks
    batch = run.samples_per_step
    fewer, more = (max(rounds, 1) * at_once for rounds in (batch // at_once, batch // at_once + 1))
    if batch % at_once:
        raise LayoutError(
            "train.global_batch_size",
            batch,
            f"does not divide into micro-batches of {run.train.micro_batch_size} on "
            f"{at_once // run.train.micro_batch_size} data-parallel ranks",
            f"use {fewer}" if fewer == more else f"use {fewer} or {more}",
        )
    stages = run.parallel.pipeline_model_parallel_size
    if run.parallel.virtual_pipeline_model_parallel_size > 1 and (batch // at_once) % stages:
        raise LayoutError(
            "train.global_batch_size",
            batch,
            f"gives {batch // at_once} microbatches, which the interleaved schedule cannot deal over {stages} stages",
            f"use a multiple of {at_once * stages}",
        )
