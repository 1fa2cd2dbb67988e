"""Aquila-VL-2B on Infinity-MM, in its six stages: the same settings, and more of each picture from stage to stage.

    torchrun --nproc-per-node 8 --nnodes 4 ... -m megavlm train aquila-vl-2b/1 \\
        --load-hf FOLDER --data-path data --export-hf NEXT

FOLDER is what `megavlm import-hf` puts together from Qwen2.5-1.5B-Instruct and SigLIP-so400m; the next stage starts
from NEXT. The data sets are those of `megavlm data catalog aquila-vl-2b/1`. Hardware: 4 nodes of 8 A100-80GB; the paper
does not say what it used. Time: not run yet. Expected: nothing is published of the first five stages; of the last, see
there.

Sources: [paper] is arXiv 2410.18558, its table of stages (grids, caps, samples, what learns, rate, batch, epochs) and
its table 1 (data); [FlagScale] the training code that its authors name, with its settings for a 1.5B decoder; [LLaVA]
LLaVA-NeXT, from which that code stems. Of the contradictions and gaps:

- steps: the samples that the table of stages prints, over 512 a step, in whole steps: 19,531, three times 16,015,
  11,718 and 5,859. Each sample counts once (epochs: 1), so what is there decides: a run for which there are fewer
  samples says so before it starts, with the number of steps to ask for. Table 1 has 24.4M samples for stage 2, a
  little less than 3 x 8.2M, which makes 15,885 steps in each third
- 2a, 2b and 2c: the data of all sources were split at random into three parts [the authors, in a discussion]: each set
  in disjoint thirds
- grid and cap: each stage's own [paper]; FlagScale's script for data has one for all but the first, and is a template
- stage 1: one tile of 729 tokens and no newline [FlagScale]; the newline is first trained in 2a
- what learns: the projector in stage 1, then everything [paper]; FlagScale's settings freeze nothing even in stage 1
- the tower's rate: 1e-5 as of all else [paper, FlagScale]; LLaVA has 2e-6, which `--tower-lr 2e-6` gives
- second beta: 0.95 [FlagScale], not LLaVA's 0.999. Epsilon is said nowhere: the usual 1e-8. The lowest rate is not said
  either: 0, where LLaVA's cosine ends
- prompts of stage 1: ChatML as in the others [FlagScale]; LLaVA would write plain captions there (`data.chat.template`)
- loss: over the tokens of the global batch, where FlagScale averages the means of its microbatches
- mask: with the header of answers and all newlines, as the released model saw it [LLaVA, FlagScale]; `data.chat.mask`
  has a clean one
- which source of table 7 went into which stage is not published: the data sets are the parts that table 1 names

Rows of 12,288 tokens, which also is the longest sample (longer ones are cut), and recompute of all layers are
FlagScale's. Its micro-batch of 2 means nothing where rows are packed.
"""

from __future__ import annotations

from collections.abc import Callable

from megavlm.build.published import in_one_pass, published
from megavlm.build.run_config import (
    SIGLIP_SO400M,
    AquilaVLConfig,
    ChatConfig,
    DataConfig,
    DecoderConfig,
    OptimizerConfig,
    PackLimits,
    ParallelConfig,
    Part,
    PrecisionConfig,
    RecomputeConfig,
    RunConfig,
    StreamConfig,
    TrainConfig,
)
from megavlm.tiles import STAGE_GRIDS

STAGES = ("1", "2a", "2b", "2c", "3", "4")
"""In the order in which the model goes through them."""
SAMPLES = {"1": 10_000_000, "2a": 8_200_000, "2b": 8_200_000, "2c": 8_200_000, "3": 6_000_000, "4": 3_000_000}
"""Of each stage, as the paper's table of stages has them."""
THIRDS = ("2a", "2b", "2c")
BATCH = 512
ROW = 12_288
EVERYTHING: tuple[Part, ...] = ("decoder", "newline", "projector", "tower")

QWEN2_5_1_5B = DecoderConfig(
    family="qwen2",
    num_layers=28,
    hidden_size=1536,
    ffn_hidden_size=8960,
    num_attention_heads=12,
    num_query_groups=2,
    kv_channels=128,
    vocab_size=151_936,
    max_position_embeddings=32_768,
    rotary_base=1_000_000,
    norm_epsilon=1e-6,
    add_qkv_bias=True,
    tied_embeddings=True,
    bos_token_id=151_643,
    eos_token_ids=(151_645,),
    pad_token_id=151_643,
)


def steps_of_a_pass(samples: int, batch: int) -> int:
    """Whole steps in which each sample comes once; the rest of a last broken step is left out."""
    return samples // batch


def stage(name: str, lr: float = 1e-5, trainable: tuple[Part, ...] = EVERYTHING) -> RunConfig:
    """One of the six: they differ in grid, data, steps, rate and what learns."""
    part = THIRDS.index(name) if name in THIRDS else 0
    parts = len(THIRDS) if name in THIRDS else 1
    recipe = f"aquila-vl-2b/{name}"
    samples = StreamConfig(
        name="samples",
        samples_per_step=BATCH,
        tokens_per_sample=ROW,
        over_long="cut",
        sources=in_one_pass(published(recipe), part, parts),
    )
    return RunConfig(
        name=recipe,
        decoder=QWEN2_5_1_5B,
        aquila_vl=AquilaVLConfig(
            tower=SIGLIP_SO400M, grid=STAGE_GRIDS[name], image_token_id=151_665, video_token_id=151_666
        ),
        trainable=trainable,
        parallel=ParallelConfig(),
        recompute=RecomputeConfig(granularity="full", method="uniform", num_layers=1, vision_tower=False),
        precision=PrecisionConfig(params_dtype="bfloat16"),
        optimizer=OptimizerConfig(
            lr=lr,
            min_lr=0.0,
            lr_decay_style="cosine",
            lr_warmup_fraction=0.03,
            weight_decay=0.0,
            adam_beta1=0.9,
            adam_beta2=0.95,
            adam_eps=1e-8,
            clip_grad=1.0,
        ),
        train=TrainConfig(train_iters=steps_of_a_pass(SAMPLES[name], BATCH), seed=12345),
        data=DataConfig(
            streams=(samples,),
            chat=ChatConfig(template="chatml", mask="released"),
            rows=PackLimits(max_tokens=ROW, rows_multiple=64),
        ),
    )


def stage_1() -> RunConfig:
    """Aquila-VL-2B on 10M captions, one tile a picture: the projector learns."""
    return stage("1", lr=1e-3, trainable=("projector",))


def stage_2a() -> RunConfig:
    """Aquila-VL-2B on the first third of 24.4M visual instructions, up to 2x2 tiles: all learns."""
    return stage("2a")


def stage_2b() -> RunConfig:
    """Aquila-VL-2B on the second third, up to 3x3 tiles: all learns."""
    return stage("2b")


def stage_2c() -> RunConfig:
    """Aquila-VL-2B on the last third, up to 4x4 tiles: all learns."""
    return stage("2c")


def stage_3() -> RunConfig:
    """Aquila-VL-2B on 6M selected visual instructions, up to 6x6 tiles: all learns."""
    return stage("3")


def stage_4() -> RunConfig:
    """Aquila-VL-2B on 3M instructions of GPT-4 and synthetic ones, up to 6x6 tiles: all learns.

    Expected [paper, table 3]: 59.5 on average over MMBench V1.1 75.2, MMStar 54.9, MMMU 47.4, MathVista 59.0,
    HallusionBench 43.0, AI2D 75.0, OCRBench 772, MM-Vet 44.3.
    """
    return stage("4")


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "aquila-vl-2b/1": stage_1,
    "aquila-vl-2b/2a": stage_2a,
    "aquila-vl-2b/2b": stage_2b,
    "aquila-vl-2b/2c": stage_2c,
    "aquila-vl-2b/3": stage_3,
    "aquila-vl-2b/4": stage_4,
}
