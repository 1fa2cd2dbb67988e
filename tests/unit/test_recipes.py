"""The recipes against the papers' tables, which are written down here a second time, by hand."""

from __future__ import annotations

import inspect
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prepared_toys import prepare_toys
from tiny_folders import write_tokenizer

from megavlm.build.data_check import check_data
from megavlm.build.published import weighted_by_size
from megavlm.build.run_config import OptimizerConfig, RunConfig, SourceConfig, StreamConfig, check_for_world
from megavlm.data.catalog import CATALOG, entries_of
from megavlm.data.chat import ChatConfig
from megavlm.data.toy_world.world import SAMPLE_KINDS
from megavlm.errors import ConfigError, DataError
from megavlm.recipes import RECIPES, aquila_vl, infimm, listing, recipe
from megavlm.tiles import plan_image

INFIMM = ("infimm-zephyr-7b", "infimm-vicuna-13b", "infimm-llama2-13b")
PUBLISHED = [name for name in RECIPES if name.startswith((*INFIMM, "aquila-vl-2b/"))]
M, K = 1_000_000, 1_000

# InfiMM, table 7: columns PT, MTT, IFT.
TABLE_7: dict[str, tuple[Any, Any, Any]] = {
    "optimizer.lr": (1e-4, 1e-5, 5e-6),
    "optimizer.min_lr": (1e-4, 1e-6, 5e-7),
    "optimizer.lr_decay_style": ("cosine",) * 3,
    "optimizer.adam_beta1": (0.9,) * 3,
    "optimizer.adam_beta2": (0.95, 0.999, 0.999),
    "optimizer.adam_eps": (1e-8, 1e-5, 1e-5),
    "optimizer.weight_decay": (0.1,) * 3,
    "optimizer.clip_grad": (1.0,) * 3,
    "optimizer.lr_warmup_iters": (6_000, 500, 300),
    "optimizer.lr_warmup_fraction": (None,) * 3,
    "optimizer.tower_lr": (None,) * 3,
    "optimizer.connector_lr": (None,) * 3,
    "optimizer.cross_attention_lr": (None,) * 3,
    "optimizer.decoder_lr": (None,) * 3,
    "train.train_iters": (285_000, 10_000, 6_000),
    "samples_per_step": (5120, 256, 64),
    "precision.params_dtype": ("bfloat16",) * 3,
    "data_parallel.use_distributed_optimizer": (True,) * 3,
    "data_parallel.grad_reduce_in_fp32": (True,) * 3,
    "recompute.granularity": ("none", "full", "none"),
}
STREAMS: dict[str, list[tuple[str, str, int]]] = {  # stage -> (model, stream, longest sample)
    "pretrain": [(model, "pairs", 32) for model in INFIMM]
    + [("infimm-zephyr-7b", "documents", 792), ("infimm-vicuna-13b", "documents", 384)]
    + [("infimm-llama2-13b", "documents", 384)],
    "multitask": [(model, "tasks", 128) for model in INFIMM],
    "finetune": [(model, "conversations", 512) for model in INFIMM],
}
TABLE_1 = {"obelics": 101 * M, "mmc4": 53 * M, "laion": 115 * M, "coyo": 238 * M, "laion-coco": 140 * M, "pmd": 20 * M}
TABLE_2 = {
    "coco-caption": 410 * K,
    "textcaps": 110 * K,
    "vizwiz-caption": 110 * K,
    "vqav2": 443 * K,
    "okvqa": 9 * K,
    "vizwiz-vqa": 20 * K,
    "gqa": 471 * K,
    "a-okvqa": 17 * K,
    "textvqa": 34 * K,
    "ocrvqa": 166 * K,
    "stvqa": 26 * K,
    "docvqa": 63 * K,
    "llavar": 16 * K,
    "scienceqa-image": 6_218,
}
# Layers, width, MLP, heads, key-value heads, head width, vocabulary; tower's image side, patch, width, depth, head
# width, MLP; a gated block before every nth layer; chat format.
MODELS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, str]] = {
    "infimm-zephyr-7b": ((32, 4096, 14336, 32, 8, 128, 32002), (336, 14, 1024, 24, 64, 2730), 2, "zephyr"),
    "infimm-vicuna-13b": ((40, 5120, 13824, 40, 40, 128, 32002), (224, 14, 1792, 64, 112, 15360), 4, "vicuna"),
    "infimm-llama2-13b": ((40, 5120, 13824, 40, 40, 128, 32002), (224, 14, 1408, 40, 88, 6144), 4, "vicuna"),
    "aquila-vl-2b": ((28, 1536, 8960, 12, 2, 128, 151936), (384, 14, 1152, 26, 16, 4304), 0, "chatml"),
}
DECODER = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
           "vocab_size")  # fmt: skip
TOWER = ("image_size", "patch_size", "width", "depth", "head_width", "mlp_width")

# Aquila-VL, table of stages: grid, tokens of an image in tiles of 729, samples in millions, rate; steps of 512 in
# thousands, as they follow.
STAGES_TABLE: dict[str, tuple[int, int, float, float, float]] = {
    "1": (1, 1, 10, 1e-3, 19.5),
    "2a": (2, 5, 8.2, 1e-5, 16.0),
    "2b": (3, 6, 8.2, 1e-5, 16.0),
    "2c": (4, 7, 8.2, 1e-5, 16.0),
    "3": (6, 10, 6, 1e-5, 11.7),
    "4": (6, 10, 3, 1e-5, 5.9),
}
INFINITY_TABLE_1 = {
    "1": {"infinity-mm-caption": 10.0},
    "2": {
        "infinity-mm-general": 7.1,
        "infinity-mm-general-ocr": 2.6,
        "infinity-mm-doc-chart-screen": 5.8,
        "infinity-mm-math-reasoning": 1.3,
        "infinity-mm-text-instruct": 7.6,
    },
    "3": {"infinity-mm-llava-onevision": 3.5, "infinity-instruct-subjective-part": 1.3, "infinity-mm-docmatix": 1.2},
    "4": {
        "infinity-mm-gpt-4-generated": 1.7,
        "infinity-mm-synthetic": 0.8,
        "infinity-mm-task-specific": 0.4,
        "infinity-preference": 0.1,
    },
}
OF_EVERY_STAGE = {
    "optimizer.min_lr": 0.0,
    "optimizer.lr_decay_style": "cosine",
    "optimizer.lr_warmup_fraction": 0.03,
    "optimizer.lr_warmup_iters": 0,
    "optimizer.tower_lr": None,
    "optimizer.connector_lr": None,
    "optimizer.decoder_lr": None,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_grad": 1.0,
    "optimizer.adam_beta1": 0.9,
    "optimizer.adam_beta2": 0.95,
    "optimizer.adam_eps": 1e-8,
    "samples_per_step": 512,
    "train.seed": 12345,
    "row_tokens": 12_288,
    "data.rows.max_tokens": 12_288,
    "data.chat.template": "chatml",
    "data.chat.mask": "released",
    "precision.params_dtype": "bfloat16",
    "recompute.granularity": "full",
    "recompute.method": "uniform",
    "recompute.num_layers": 1,
    "recompute.vision_tower": False,
    "decoder.rotary_base": 1_000_000,
    "decoder.norm_epsilon": 1e-6,
    "decoder.tied_embeddings": True,
    "decoder.add_qkv_bias": True,
    "aquila_vl.image_token_id": 151_665,
    "aquila_vl.video_token_id": 151_666,
}


def at(run: RunConfig, path: str) -> Any:
    return reduce(getattr, path.split("."), run)


def streams_of(run: RunConfig) -> dict[str, StreamConfig]:
    assert run.data is not None
    return {stream.name: stream for stream in run.data.streams}


def sources_of(run: RunConfig) -> dict[str, SourceConfig]:
    return {source.name: source for stream in streams_of(run).values() for source in stream.sources}


@pytest.mark.parametrize("model", INFIMM)
@pytest.mark.parametrize("column, stage", enumerate(("pretrain", "multitask", "finetune")))
def test_infimm_is_table_7(model: str, column: int, stage: str) -> None:
    run = recipe(f"{model}/{stage}")
    assert {path: at(run, path) for path in TABLE_7} == {path: values[column] for path, values in TABLE_7.items()}
    found = {(model, name, stream.tokens_per_sample) for name, stream in streams_of(run).items()}
    assert found == {entry for entry in STREAMS[stage] if entry[0] == model}
    for stream in streams_of(run).values():
        assert (stream.over_long, stream.loss_weight) == ("cut", 1.0)
    assert run.data is not None
    assert run.data.chat.template == ("plain" if stage == "pretrain" else MODELS[model][3])


def test_infimm_blends_by_tables_1_and_2() -> None:
    for model, split in zip(INFIMM, [(3901, 1219), (3938, 1182), (3938, 1182)], strict=True):
        run = recipe(f"{model}/pretrain")
        pairs, documents = streams_of(run)["pairs"], streams_of(run)["documents"]
        assert (pairs.samples_per_step, documents.samples_per_step) == split
        assert {source.name: source.weight for source in documents.sources} == {
            name: TABLE_1[name] for name in ("obelics", "mmc4")
        }
        names = ("laion", "coyo", "laion-coco") if "7b" in model else ("laion", "coyo", "laion-coco", "pmd")
        assert {source.name: source.weight for source in pairs.sources} == {name: TABLE_1[name] for name in names}
        # Both streams go through their data equally often.
        passes = [split[0] / sum(TABLE_1[name] for name in names), split[1] / (154 * M)]
        assert passes[0] == pytest.approx(passes[1], rel=1e-3)
        tasks = sources_of(recipe(f"{model}/multitask"))
        assert {name: source.weight for name, source in tasks.items()} == TABLE_2
        assert list(sources_of(recipe(f"{model}/finetune"))) == ["llava-665k"]
    assert round(285_000 * 5120 / sum(TABLE_1.values()), 2) == 2.19
    assert round(285_000 * 5120 / (sum(TABLE_1.values()) - 20 * M), 2) == 2.26


def test_tasks_may_be_left_out() -> None:
    run = infimm.multitask(infimm.LLAMA2, leave_out=("scienceqa-image", "llavar"))
    assert sources_of(run).keys() == TABLE_2.keys() - {"scienceqa-image", "llavar"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_their_published_shapes(name: str) -> None:
    run, model = recipe(name), name.partition("/")[0]
    decoder, tower, every, _ = MODELS[model]
    assert tuple(getattr(run.decoder, field) for field in DECODER) == decoder
    if run.aquila_vl is not None:
        fields = [field.replace("head_width", "heads") for field in TOWER]
        assert tuple(getattr(run.aquila_vl.tower, field) for field in fields) == tower
        return
    assert run.infimm is not None
    assert tuple(getattr(run.infimm.tower, field) for field in TOWER) == tower
    resampler, gated = run.infimm.resampler, run.infimm.cross_attention
    assert (resampler.depth, resampler.num_latents, resampler.heads, resampler.head_width) == (6, 64, 8, 64)
    assert (gated.every_n_layers, gated.heads, gated.head_width) == (every, 8, 64)
    assert (run.infimm.eoc_token_id, run.infimm.image_token_id) == (32000, 32001)
    assert (run.decoder.norm_epsilon, run.decoder.rotary_base) == (1e-5, 10_000)


def test_infimm_trains_what_the_paper_and_the_cards_say() -> None:
    for model in INFIMM:
        assert {*recipe(f"{model}/pretrain").trainable} == {"resampler", "cross_attention", "new_tokens"}
        assert {*recipe(f"{model}/multitask").trainable} == {"resampler", "cross_attention"}
        decoder = {"decoder"} if "llama" in model else set()
        for stage in ("finetune", "finetune-card"):
            assert {*recipe(f"{model}/{stage}").trainable} == {"resampler", "cross_attention"} | decoder


@pytest.mark.parametrize("model", INFIMM)
def test_the_card_finetunes_otherwise_in_these_settings_alone(model: str) -> None:
    card, paper = recipe(f"{model}/finetune-card"), recipe(f"{model}/finetune")
    optimizer = paper.optimizer.replace(
        lr=1e-5, min_lr=0.0, lr_decay_style="constant", lr_warmup_iters=0, lr_warmup_fraction=0.005, adam_eps=1e-8
    )
    train = paper.train.replace(train_iters=10_390)
    assert card == paper.replace(name=card.name, optimizer=optimizer, train=train)


@pytest.mark.parametrize("stage", STAGES_TABLE)
def test_aquila_vl_is_its_table_of_stages(stage: str) -> None:
    grid, tokens, samples, lr, steps = STAGES_TABLE[stage]
    run = recipe(f"aquila-vl-2b/{stage}")
    assert {path: at(run, path) for path in OF_EVERY_STAGE} == OF_EVERY_STAGE
    assert run.optimizer.lr == lr
    full = {"decoder", "newline", "projector", "tower"}
    assert {*run.trainable} == ({"projector"} if stage == "1" else full)
    assert run.aquila_vl is not None
    assert run.aquila_vl.grid.tiling == ("single" if stage == "1" else "grid")
    if stage == "1":
        assert plan_image(500, 500, "image", run.aquila_vl.grid).tokens == 729
    else:
        assert (run.aquila_vl.grid.max_tiles_per_side, run.aquila_vl.grid.cap_tiles + 1) == (grid, tokens)
    assert 0 <= samples * M - run.train.train_iters * 512 < 512
    assert round(run.train.train_iters / 1000, 1) == steps
    (stream,) = streams_of(run).values()
    assert (stream.tokens_per_sample, stream.over_long, stream.loss_weight) == (12_288, "cut", 1.0)


@pytest.mark.parametrize("stage", STAGES_TABLE)
def test_aquila_vl_reads_its_parts_once(stage: str) -> None:
    sources = sources_of(recipe(f"aquila-vl-2b/{stage}"))
    published = INFINITY_TABLE_1[stage[0]]
    assert sources.keys() == published.keys()
    assert {name: entry.samples for entry in CATALOG if (name := entry.slug) in published} == {
        name: round(size * M) for name, size in published.items()
    }
    thirds = {"2a": (0, 3), "2b": (1, 3), "2c": (2, 3)}
    for source in sources.values():
        assert (source.epochs, source.part, source.parts) == (1.0, *thirds.get(stage, (0, 1)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_sources_are_folders_of_the_catalog(name: str) -> None:
    entries = {entry.slug for entry in entries_of(name.removesuffix("-card"))}
    assert sources_of(recipe(name)).keys() == entries


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_fit_their_clusters(name: str) -> None:
    nodes = 5 if name.endswith("/pretrain") else 4
    check_for_world(recipe(name), nodes * 8)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_come_back_from_yaml_under_their_names(name: str) -> None:
    run = recipe(name)
    assert run.name == name
    assert RunConfig.from_yaml(run.to_yaml()) == run


SHARED = {
    "infimm": ("decoder", "infimm", "precision", "optimizer.weight_decay", "optimizer.clip_grad", "train.seed"),
    "aquila-vl": (
        *("decoder", "aquila_vl.tower", "aquila_vl.placeholders", "precision", "recompute", "data.chat", "data.rows"),
        *(path for path in OF_EVERY_STAGE if path.startswith(("optimizer.", "train."))),
    ),
}


@pytest.mark.parametrize("model", [*INFIMM, "infimm-tiny", "aquila-vl-2b", "aquila-vl-tiny"])
def test_stages_of_a_model_share_its_science(model: str) -> None:
    stages = infimm.STAGES if model.startswith("infimm") else aquila_vl.STAGES
    runs = [recipe(f"{model}/{stage}") for stage in stages]
    family = "infimm" if model.startswith("infimm") else "aquila-vl"
    for one, other in pairwise(runs):
        assert {path: at(one, path) for path in SHARED[family]} == {path: at(other, path) for path in SHARED[family]}
    assert len({run.to_yaml() for run in runs}) == len(stages)


@pytest.mark.parametrize("toy, real", [("infimm-tiny", "infimm-llama2-13b"), ("aquila-vl-tiny", "aquila-vl-2b")])
def test_toys_are_the_real_stages_made_small(toy: str, real: str) -> None:
    for stage in infimm.STAGES if "infimm" in toy else aquila_vl.STAGES:
        small, large = recipe(f"{toy}/{stage}"), recipe(f"{real}/{stage}")
        for path in ("trainable", "data.chat", "optimizer.lr_decay_style", "optimizer.adam_beta2"):
            assert at(small, path) == at(large, path), path
        assert list(streams_of(small)) == list(streams_of(large))
        parts = [{(source.part, source.parts) for source in sources_of(run).values()} for run in (small, large)]
        assert parts[0] == parts[1]
        assert sources_of(small).keys() <= {f"toy-{kind}" for kind in SAMPLE_KINDS}
        if small.aquila_vl is not None and large.aquila_vl is not None:
            same = small.aquila_vl.grid.replace(tile_size=384, patch_size=14)
            assert same == large.aquila_vl.grid
        for ranks in (1, 2, 4):
            check_for_world(small, ranks)
            degrees = small.parallel.replace(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
        check_for_world(small.replace(parallel=degrees.replace(virtual_pipeline_model_parallel_size=2)), 8)


def test_warm_up_as_a_fraction_is_whole_steps() -> None:
    assert OptimizerConfig(lr_warmup_fraction=0.03).warmup_steps(100) == 3
    assert OptimizerConfig(lr_warmup_fraction=0.03).warmup_steps(101) == 4
    assert OptimizerConfig(lr_warmup_fraction=0.0).warmup_steps(101) == 0
    assert OptimizerConfig(lr_warmup_iters=7).warmup_steps(100) == 7
    assert recipe("aquila-vl-2b/1").optimizer.warmup_steps(19_531) == 586
    with pytest.raises(ConfigError, match=r"lr_warmup_fraction = 0\.1: stands beside lr_warmup_iters \(5\)"):
        OptimizerConfig(lr_warmup_fraction=0.1, lr_warmup_iters=5)
    with pytest.raises(ConfigError, match=r"lr_warmup_fraction = 1\.0: is outside"):
        OptimizerConfig(lr_warmup_fraction=1.0)


def test_a_frozen_tower_has_no_rate() -> None:
    assert recipe("aquila-vl-2b/2a").override("optimizer.tower_lr=2e-6").optimizer.tower_lr == 2e-6
    with pytest.raises(ConfigError, match=r"optimizer\.tower_lr = 2e-06: is for a trained tower"):
        recipe("aquila-vl-2b/1").override("optimizer.tower_lr=2e-6")


def test_the_listing_has_every_recipe_and_keeps_models_together() -> None:
    lines = listing().split("\n")
    names = [line.split()[0] for line in lines if line]
    assert [name for name in names if name in RECIPES] == list(RECIPES)
    assert {name for name in names if name not in RECIPES} == {n.partition("/")[0] for n in RECIPES if "/" in n}
    groups = [
        {line.partition("/")[0] for line in group.split("\n") if "/" in line} for group in listing().split("\n\n")
    ]
    assert [len(group) for group in groups] == [0, 1, 1, 1, 1, 1, 1]
    assert all(len(line.split(None, 1)[1]) > 30 and line.endswith(".") for line in lines if line)


def test_a_model_without_its_stage_is_answered_with_its_stages() -> None:
    with pytest.raises(ConfigError, match="use one of aquila-vl-2b/1, aquila-vl-2b/2a, .*aquila-vl-2b/4"):
        recipe("aquila-vl-2b")
    with pytest.raises(ConfigError, match="did you mean infimm-llama2-13b/multitask"):
        recipe("infimm-lama2-13b/multitask")


def test_absent_data_are_named_with_the_command_that_makes_them(tmp_path: Path) -> None:
    run = recipe("infimm-llama2-13b/pretrain").override(f"data.path={tmp_path}")
    with pytest.raises(DataError) as caught:
        check_data(run)
    folder = tmp_path / "laion"
    assert str(caught.value) == (
        f"data set = '{folder}': holds no prepared data set, one of 6 absent of this run's 6; run `megavlm data "
        f"prepare SOURCE... --out {folder} --format img2dataset`, or name another folder by --data-path"
    )
    (folder).mkdir()
    (folder / "dataset.json").touch()
    with pytest.raises(DataError, match=r"coyo': holds no prepared data set, one of 5 absent of this run's 6"):
        check_data(run)


def test_data_too_few_for_the_steps_are_said_before_the_run(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    prepare_toys(tmp_path, tmp_path, ChatConfig(template="vicuna"), {"text": 9})
    once = StreamConfig(samples_per_step=2, sources=(SourceConfig(name="text", epochs=1),))
    run = recipe("infimm-tiny/finetune")
    assert run.data is not None
    data = run.data.replace(path=str(tmp_path), tokenizer=str(tmp_path), streams=(once,))
    with pytest.raises(ConfigError, match=r"infimm\.image_token_id = 262: the tokenizer in .* has 127 for <image>"):
        check_data(run.replace(data=data))
    run = run.replace(data=data).override("infimm.image_token_id=127", "infimm.eoc_token_id=126")
    with pytest.raises(ConfigError, match=r"train_iters = \d+: is more than the 5 steps .* use --train-iters 5"):
        check_data(run)
    check_data(run.override("train.train_iters=5"))


def test_sizes_that_are_not_published_must_be_given() -> None:
    entries = [entry for entry in CATALOG if entry.slug == "scienceqa-image"]
    assert weighted_by_size(entries, {"scienceqa-image": 5}) == (SourceConfig(name="scienceqa-image", weight=5),)
    with pytest.raises(KeyError):
        weighted_by_size(entries)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_say_command_hardware_time_and_result(name: str) -> None:
    said = RECIPES[name].__doc__ or ""
    module = inspect.getmodule(RECIPES[name])
    assert module is not None and "megavlm train" in (module.__doc__ or "")
    if module is aquila_vl:
        said += aquila_vl.__doc__ or ""
    for word in ("Hardware: ", "Time: not run yet.", "Expected"):
        assert word in said, word
