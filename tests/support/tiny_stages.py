"""The stages of the tiny recipes on a small toy world, two samples a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qwen_hf import write_tokenizer

from megavlm.build.loader import build_words
from megavlm.build.run_config import ParallelConfig, RunConfig
from megavlm.data.shards import write_shards
from megavlm.data.token_counts import add_token_counts
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.toy_world.samples import toy_samples
from megavlm.data.toy_world.world import SampleKind, ToyWorld
from megavlm.recipes import recipe

STAGES = [f"infimm-tiny/{stage}" for stage in ("pretrain", "multitask", "finetune")]
STAGES += [f"aquila-vl-tiny/{stage}" for stage in ("1", "2a", "2b", "2c", "3", "4")]
KINDS: tuple[SampleKind, ...] = ("pairs", "documents", "chat", "multi_image", "text")
SAMPLES, PER_STEP = 60, 2


def prepare_stages(root: Path) -> Path:
    """The data sets that the stages name, with the token counts of each; and the tokenizer."""
    write_tokenizer(root / "tokenizer")
    world = ToyWorld(sizes=((64, 64), (128, 64)))
    for kind in KINDS:
        write_shards([list(toy_samples(kind, "train", 0, SAMPLES, world))], root / "data" / f"toy-{kind}")
    counted = set()
    for stage in STAGES:
        run = tiny_stage(stage, root, {})
        assert run.data is not None
        words = build_words(run)
        for source in (source for stream in run.data.streams for source in stream.sources):
            if (source.name, words.hash) not in counted:
                counted.add((source.name, words.hash))
                add_token_counts(root / "data" / source.name, words.count, words.name, words.hash)
    return root


def tiny_stage(name: str, root: Path, degrees: dict[str, Any]) -> RunConfig:
    """A stage of a tiny recipe, with this tokenizer, and learning from its first step on."""
    run, tokenizer = recipe(name), Tokenizer(str(root / "tokenizer"))
    assert run.data is not None
    image, video = tokenizer.token_of("<image>"), tokenizer.token_of("<video>")
    assert image is not None and video is not None
    tags: dict[str, Any] = {}
    decoder = run.decoder.replace(vocab_size=512)
    if run.infimm is not None:
        tags["infimm"] = run.infimm.replace(image_token_id=image)
    if run.aquila_vl is not None:
        tags["aquila_vl"] = run.aquila_vl.replace(image_token_id=image, video_token_id=video)
        decoder = decoder.replace(num_query_groups=2, tied_embeddings=True)  # as the real model, unlike its toy
    of_each = PER_STEP // len(run.data.streams)
    data = run.data.replace(
        path=str(root / "data"),
        tokenizer=str(root / "tokenizer"),
        streams=tuple(stream.replace(samples_per_step=of_each) for stream in run.data.streams),
        rows=run.data.rows.replace(rows_multiple=2),
    )
    return run.replace(
        data=data,
        decoder=decoder,
        parallel=ParallelConfig(**degrees),
        optimizer=run.optimizer.replace(lr_warmup_iters=0, lr_warmup_fraction=None),
        **tags,
    )
