"""InfiMM's three models, each in the three stages of the paper, and the model card's other finetuning.

    torchrun --nproc-per-node 8 --nnodes 5 ... -m megavlm train infimm-llama2-13b/pretrain \\
        --load-hf FOLDER --data-path data --export-hf NEXT

FOLDER is what `megavlm import-hf` puts together from a decoder and a tower; the next stage starts from NEXT. The data
sets are those of `megavlm data catalog infimm-llama2-13b/pretrain`. Each function says its hardware, time and expected
result; no run of these has been made by us yet.

Sources: [paper] is InfiMM's, table 7 (all hyperparameters, of a LLaMA2-13B run), tables 1 and 2 (data), tables 3 to 5
(results); [card] the model card; [code] the released code and its configs. Vicuna and Zephyr take table 7 as well,
where nothing else is published. Of the contradictions:

- tower: the paper's "EVA2-CLIP-G" does not exist. EVA02-CLIP-L/14 at 336 pixels for Zephyr [code], EVA02-CLIP-E/14 at
  224 for Vicuna [its config], EVA01-CLIP-g/14 at 224 for LLaMA2 [card]
- resampler: 64 latents (table 7, card, code; the paper's text has 32), 8 heads of 64 (code, and the size of the
  released file, which 16 heads of 96 would exceed [card])
- second beta of pretraining: 0.95 (table 7), not 0.999 [card]
- pretraining's warm-up: 6,000 of 285,000 steps (table 7), not 0.5 % [card]. Its schedule is printed as cosine, and its
  lowest rate as the highest one: it is constant after the warm-up, as the card says
- longest document: 384 tokens for 13B (table 7), 792 for 7B [card]
- pretraining's length: 285,000 steps of 5,120 samples (table 7) are 2.19 passes over table 1's 667M samples, where the
  card says one. The steps count. Without PMD, which only the 13B models saw, Zephyr makes 2.26 passes
- pairs and documents: nowhere said. A step's 5,120 samples are split by table 1: 3,938 pairs and 1,182 documents, for
  Zephyr 3,901 and 1,219. Both streams weigh 1 in the loss (OpenFlamingo's script: 0.2 and 1). Within a stream data sets
  are blended by size
- multi-task data: A-OKVQA and LLaVAR (table 2) and ScienceQA-image [card] are all in; the latter counts as 6,218, its
  training questions with a picture, since neither says. `multitask(MODEL, leave_out=...)` makes a run without some.
  10,000 steps are 1.35 passes
- finetuning of the decoder: for LLaMA2 alone [card]; Vicuna's and Zephyr's stays frozen (card, code), though the paper
  calls all but the tower trainable
- finetuning's rate: 5e-6 to 5e-7 by cosine over 6,000 steps, 0.58 of a pass (table 7). `finetune-card` has the card's:
  constantly 1e-5 behind a warm-up of 0.5 %, Adam's 0.999 and 1e-8, and one pass, of which a comment in the card speaks
- the rows of the two new tokens: not said. They are trained in pretraining, where they are fresh, and frozen then
- accumulation of gradients: table 7 has two rows that differ. It follows from layout and row length here

Not published, so ours: Vicuna v1.1's chat format for LLaMA2 (Vicuna's own repository has no readable one either);
multi-task samples in the chat format of the model; texts above a limit are cut, as in OpenFlamingo; no random flips.
Layout, row length, `rows_multiple` and recompute (on for multi-task, as in table 7) are scale, not science.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from megavlm.build.published import published, published_samples, weighted_by_size
from megavlm.build.run_config import (
    ChatConfig,
    CrossAttentionConfig,
    DataConfig,
    DecoderConfig,
    InfiMMConfig,
    OptimizerConfig,
    PackLimits,
    ParallelConfig,
    Part,
    PrecisionConfig,
    RecomputeConfig,
    ResamplerConfig,
    RunConfig,
    StreamConfig,
    TrainConfig,
    eva_tower,
)

STAGES = ("pretrain", "multitask", "finetune")
"""In the order in which a model goes through them."""

FROZEN_DECODER: tuple[Part, ...] = ("cross_attention", "resampler")
TEXT_KINDS = {"pairs": ("pairs",), "documents": ("interleaved documents",)}
SCIENCE_QA = {"scienceqa-image": 6_218}
ROW = 2048
"""Tokens of a row: scale, not science."""


@dataclass(frozen=True)
class Model:
    """What tells the three models apart."""

    name: str
    model_type: str
    decoder: DecoderConfig
    tower: str
    every_n_layers: int
    template: Literal["zephyr", "vicuna"]
    document_tokens: int
    finetuned: tuple[Part, ...]
    """What learns in the last stage."""
    tensor_parallel: int
    """In the first two stages."""
    tensor_parallel_finetuning: int

    @property
    def parts(self) -> InfiMMConfig:
        tower = eva_tower(self.tower)
        return InfiMMConfig(
            model_type=self.model_type,
            tower=tower,
            resampler=ResamplerConfig(width=tower.width, depth=6, num_latents=64, heads=8, head_width=64),
            cross_attention=CrossAttentionConfig(every_n_layers=self.every_n_layers, heads=8, head_width=64),
            image_token_id=32001,
            eoc_token_id=32000,
        )


LLAMA2_13B = DecoderConfig(
    family="llama",
    num_layers=40,
    hidden_size=5120,
    ffn_hidden_size=13824,
    num_attention_heads=40,
    num_query_groups=40,
    kv_channels=128,
    vocab_size=32002,
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_ids=(2,),
)
ZEPHYR_7B = DecoderConfig(
    family="mistral",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=32002,
    max_position_embeddings=32768,
    sliding_window=4096,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=2,
)

ZEPHYR = Model(
    name="infimm-zephyr-7b",
    model_type="infimm-zephyr",
    decoder=ZEPHYR_7B,
    tower="EVA02-CLIP-L/14-336",
    every_n_layers=2,
    template="zephyr",
    document_tokens=792,
    finetuned=FROZEN_DECODER,
    tensor_parallel=1,
    tensor_parallel_finetuning=1,
)
VICUNA = Model(
    name="infimm-vicuna-13b",
    model_type="infimm-vicuna",
    decoder=LLAMA2_13B.replace(pad_token_id=0),
    tower="EVA02-CLIP-E/14-224",
    every_n_layers=4,
    template="vicuna",
    document_tokens=384,
    finetuned=FROZEN_DECODER,
    tensor_parallel=2,
    tensor_parallel_finetuning=2,
)
LLAMA2 = Model(
    name="infimm-llama2-13b",
    model_type="infimm-llama",
    decoder=LLAMA2_13B,
    tower="EVA01-CLIP-g/14-224",
    every_n_layers=4,
    template="vicuna",
    document_tokens=384,
    finetuned=("decoder", *FROZEN_DECODER),
    tensor_parallel=2,
    tensor_parallel_finetuning=4,
)


def split_by_size(batch: int, pairs: int, documents: int) -> tuple[int, int]:
    """A step's pairs and documents, in the proportion of all there are."""
    of_pairs = round(batch * pairs / (pairs + documents))
    return of_pairs, batch - of_pairs


def pretrain(model: Model, batch: int = 5120) -> RunConfig:
    """Captions and interleaved documents, side by side in each step."""
    stage = f"{model.name}/pretrain"
    sources = {name: published(stage, kinds) for name, kinds in TEXT_KINDS.items()}
    pairs, documents = split_by_size(batch, *(published_samples(entries) for entries in sources.values()))
    streams = tuple(
        StreamConfig(
            name=name,
            samples_per_step=samples,
            loss_weight=1.0,
            tokens_per_sample=tokens,
            over_long="cut",
            sources=weighted_by_size(sources[name]),
        )
        for name, samples, tokens in (("pairs", pairs, 32), ("documents", documents, model.document_tokens))
    )
    return RunConfig(
        name=stage,
        decoder=model.decoder,
        infimm=model.parts,
        trainable=(*FROZEN_DECODER, "new_tokens"),
        parallel=_layout(model.tensor_parallel),
        precision=PrecisionConfig(params_dtype="bfloat16"),
        optimizer=OptimizerConfig(
            lr=1e-4,
            min_lr=1e-4,
            lr_decay_style="cosine",
            lr_warmup_iters=6000,
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_eps=1e-8,
            clip_grad=1.0,
        ),
        train=TrainConfig(train_iters=285_000),
        data=DataConfig(
            streams=streams,
            chat=ChatConfig(template="plain"),
            rows=PackLimits(max_tokens=ROW, rows_multiple=40),  # of 5 nodes of 8
        ),
    )


def multitask(model: Model, leave_out: Collection[str] = ()) -> RunConfig:
    """Captions and questions of fourteen academic data sets, some of which may be left out by their folders' names."""
    stage = f"{model.name}/multitask"
    entries = [entry for entry in published(stage) if entry.slug not in leave_out]
    tasks = StreamConfig(
        name="tasks",
        samples_per_step=256,
        tokens_per_sample=128,
        over_long="cut",
        sources=weighted_by_size(entries, SCIENCE_QA),
    )
    return RunConfig(
        name=stage,
        decoder=model.decoder,
        infimm=model.parts,
        trainable=FROZEN_DECODER,
        parallel=_layout(model.tensor_parallel),
        recompute=RecomputeConfig(granularity="full", method="uniform", num_layers=1),
        precision=PrecisionConfig(params_dtype="bfloat16"),
        optimizer=_later_optimizer(lr=1e-5, min_lr=1e-6, lr_warmup_iters=500),
        train=TrainConfig(train_iters=10_000),
        data=DataConfig(streams=(tasks,), chat=ChatConfig(template=model.template), rows=_rows_of_four_nodes()),
    )


def finetune(model: Model) -> RunConfig:
    """Conversations of LLaVA-1.5's mixture, 40k of them without a picture."""
    stage = f"{model.name}/finetune"
    conversations = StreamConfig(
        name="conversations",
        samples_per_step=64,
        tokens_per_sample=512,
        over_long="cut",
        sources=weighted_by_size(published(stage)),
    )
    return RunConfig(
        name=stage,
        decoder=model.decoder,
        infimm=model.parts,
        trainable=model.finetuned,
        parallel=_layout(model.tensor_parallel_finetuning),
        precision=PrecisionConfig(params_dtype="bfloat16"),
        optimizer=_later_optimizer(lr=5e-6, min_lr=5e-7, lr_warmup_iters=300),
        train=TrainConfig(train_iters=6_000),
        data=DataConfig(streams=(conversations,), chat=ChatConfig(template=model.template), rows=_rows_of_four_nodes()),
    )


def finetune_card(model: Model) -> RunConfig:
    """The same with what the model card says of rate, schedule and length."""
    base = finetune(model)
    passes = published_samples(published(base.name)) // base.samples_per_step
    return base.replace(
        name=f"{model.name}/finetune-card",
        optimizer=base.optimizer.replace(
            lr=1e-5,
            min_lr=0.0,
            lr_decay_style="constant",
            lr_warmup_iters=0,
            lr_warmup_fraction=0.005,
            adam_eps=1e-8,
        ),
        train=base.train.replace(train_iters=passes),
    )


def _later_optimizer(lr: float, min_lr: float, lr_warmup_iters: int) -> OptimizerConfig:
    """Table 7's, of the two stages behind pretraining."""
    return OptimizerConfig(
        lr=lr,
        min_lr=min_lr,
        lr_decay_style="cosine",
        lr_warmup_iters=lr_warmup_iters,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_eps=1e-5,
        clip_grad=1.0,
    )


def _layout(tensor_parallel: int) -> ParallelConfig:
    return ParallelConfig(tensor_model_parallel_size=tensor_parallel, sequence_parallel=tensor_parallel > 1)


def _rows_of_four_nodes() -> PackLimits:
    return PackLimits(max_tokens=ROW, rows_multiple=32)


def zephyr_pretrain() -> RunConfig:
    """InfiMM-Zephyr-7B on captions and documents: resampler, gated blocks and the two new tokens learn.

    Hardware: 5 nodes of 8 A100-80GB. Time: not run yet. Expected, 4 shots [paper, table 4]: COCO 108.6, Flickr30k 71.9,
    OKVQA 50.5, VQAv2 59.1, TextVQA 34.3.
    """
    return pretrain(ZEPHYR)


def zephyr_multitask() -> RunConfig:
    """InfiMM-Zephyr-7B on captions and questions: resampler and gated blocks learn.

    Hardware: 4 nodes of 8 A100-80GB. Time: not run yet. Expected: nothing is published of this stage alone.
    """
    return multitask(ZEPHYR)


def zephyr_finetune() -> RunConfig:
    """InfiMM-Zephyr-7B on conversations: resampler and gated blocks learn.

    Hardware: 4 nodes of 8 A100-80GB. Time: not run yet. Expected [paper, table 3]: ScienceQA 71.1, MME 1406 and 327,
    MM-Vet 32.8, InfiMM-Eval 36.0, MMBench 59.7, MMMU 39.4 (val) and 35.5 (test).
    """
    return finetune(ZEPHYR)


def zephyr_finetune_card() -> RunConfig:
    """InfiMM-Zephyr-7B on conversations, with the model card's rate and length in place of table 7's.

    Hardware: 4 nodes of 8 A100-80GB. Time: not run yet. Expected: as of finetune.
    """
    return finetune_card(ZEPHYR)


def vicuna_pretrain() -> RunConfig:
    """InfiMM-Vicuna-13B on captions and documents: resampler, gated blocks and the two new tokens learn.

    Hardware: 5 nodes of 8 A100-80GB. Time: not run yet. Expected, 4 shots [paper, table 4]: COCO 118.1, Flickr30k 81.4,
    OKVQA 53.7, VQAv2 64.2, TextVQA 38.4.
    """
    return pretrain(VICUNA)


def vicuna_multitask() -> RunConfig:
    """InfiMM-Vicuna-13B on captions and questions: resampler and gated blocks learn.

    Hardware: 4 nodes of 8 A100-80GB. Time: not run yet. Expected: nothing is published of this stage alone.
    """
    return multitask(VICUNA)


def vicuna_finetune() -> RunConfig:
    """InfiMM-Vicuna-13B on conversations: resampler and gated blocks learn.

    Hardware: 4 nodes of 8 A100-80GB. Time: not run yet. Expected [paper, table 3]: ScienceQA 74.0, MME 1461 and 324,
    MM-Vet 36.0, InfiMM-Eval 40.0, MMBench 66.7, MMMU 37.6 (val) and 34.6 (test).
    """
    return finetune(VICUNA)


def vicuna_finetune_card() -> RunConfig:
    """InfiMM-Vicuna-13B on conversations, with the model card's rate and length in place of table 7's.

    Hardware: 4 nodes of 8 A100-80GB. Time: not run yet. Expected: as of finetune.
    """
    return finetune_card(VICUNA)


def llama2_pretrain() -> RunConfig:
    """InfiMM-LLaMA2-13B on captions and documents: resampler, gated blocks and the two new tokens learn.

    Hardware: 5 nodes of 8 A100-80GB. Time: not run yet. Expected, 4 shots [paper, table 4]: COCO 125.2, Flickr30k 87.1,
    OKVQA 55.5, VQAv2 66.1, TextVQA 38.2.
    """
    return pretrain(LLAMA2)


def llama2_multitask() -> RunConfig:
    """InfiMM-LLaMA2-13B on captions and questions: resampler and gated blocks learn.

    Hardware: 4 nodes of 8 A100-80GB. Time: not run yet. Expected [paper, table 5, no finetuning behind it]: OKVQA 63.4,
    VQAv2 76.9, TextVQA 45.0, GQA 62.0, InfiMM-Eval 28.3.
    """
    return multitask(LLAMA2)


def llama2_finetune() -> RunConfig:
    """InfiMM-LLaMA2-13B on conversations: all but the tower learns.

    Hardware: 4 nodes of 8 A100-80GB. Time: not run yet. Expected [paper, table 3]: ScienceQA 73.0, MME 1445 and 338,
    MM-Vet 39.2, InfiMM-Eval 41.4, MMBench 66.4, MMMU 39.1 (val) and 35.2 (test).
    """
    return finetune(LLAMA2)


def llama2_finetune_card() -> RunConfig:
    """InfiMM-LLaMA2-13B on conversations, with the model card's rate and length in place of table 7's.

    Hardware: 4 nodes of 8 A100-80GB. Time: not run yet. Expected: as of finetune.
    """
    return finetune_card(LLAMA2)


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "infimm-zephyr-7b/pretrain": zephyr_pretrain,
    "infimm-zephyr-7b/multitask": zephyr_multitask,
    "infimm-zephyr-7b/finetune": zephyr_finetune,
    "infimm-zephyr-7b/finetune-card": zephyr_finetune_card,
    "infimm-vicuna-13b/pretrain": vicuna_pretrain,
    "infimm-vicuna-13b/multitask": vicuna_multitask,
    "infimm-vicuna-13b/finetune": vicuna_finetune,
    "infimm-vicuna-13b/finetune-card": vicuna_finetune_card,
    "infimm-llama2-13b/pretrain": llama2_pretrain,
    "infimm-llama2-13b/multitask": llama2_multitask,
    "infimm-llama2-13b/finetune": llama2_finetune,
    "infimm-llama2-13b/finetune-card": llama2_finetune_card,
}
