"""Generated text equals what transformers generates, and what full passes over the growing text give.

One spawn a layout runs all models. The references of transformers are computed once, in the test's own process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megavlm.batch import AttendedMedia, TextBatch, next_token_batch, preceding_images
from megavlm.build.from_folder import run_from_folder
from megavlm.build.model import Model, build_model
from megavlm.build.run_config import ParallelConfig, PrecisionConfig, RunConfig, check_for_world
from megavlm.errors import MegavlmError
from megavlm.infer.generate import generate
from megavlm.infer.logits import compute_logits
from megavlm.infer.prompt import Prompt
from megavlm.infer.sampling import SamplingConfig, choose_token
from megavlm.parallel import groups as process_groups
from megavlm.parallel.groups import Groups
from megavlm.testing import spawn

GOLDEN = Path(__file__).parents[1] / "fixtures" / "infimm_zephyr_tiny"
FAMILIES = ("llama", "mistral", "qwen2")
VOCABULARY, NEW = 101, 32
LENGTHS = (5, 1, 11, 5)
GREEDY = SamplingConfig(max_new_tokens=NEW, eos_token_ids=())
SAMPLED = SamplingConfig(max_new_tokens=NEW, do_sample=True, temperature=0.8, top_k=40, top_p=0.95, eos_token_ids=())
DRAWN = SamplingConfig(max_new_tokens=NEW, do_sample=True, top_p=0.9, eos_token_ids=())
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP=2": (2, {"tensor_model_parallel_size": 2}),
}


def random_transformers_model(family: str) -> Any:
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": {"llama": 4, "mistral": 2, "qwen2": 2}[family],
        "head_dim": 12 if family == "mistral" else 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
        "tie_word_embeddings": family == "qwen2",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    kinds = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
    }
    torch.manual_seed(FAMILIES.index(family))
    return transformers.AutoModelForCausalLM.from_config(kinds[family](**shape)).eval()


def random_prompts() -> list[Prompt]:
    draw = torch.Generator().manual_seed(7)
    return [Prompt(torch.randint(0, VOCABULARY, (length,), generator=draw)) for length in LENGTHS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[int]]]]:
    """For each family a folder, and what transformers generates greedily from it, prompt by prompt."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        model = random_transformers_model(family)
        model.save_pretrained(folder)
        texts = [
            model.generate(prompt.tokens[None], max_new_tokens=NEW, do_sample=False)[0, len(prompt.tokens) :].tolist()
            for prompt in random_prompts()
        ]
        assert all(len(text) == NEW for text in texts)
        assert len({token for text in texts for token in text}) > NEW, "a text that repeats itself shows little"
        made[family] = (folder, texts)
    return made


def start(folder: Path, degrees: dict[str, Any], **changes: Any) -> tuple[Model, RunConfig, Groups]:
    world_size = process_groups.join()
    run = run_from_folder(folder)
    run = run.replace(
        **changes,
        parallel=ParallelConfig(**degrees),
        precision=PrecisionConfig(params_dtype="float32"),
        make_vocab_size_divisible_by=3,
        train=run.train.replace(seq_length=8),
    )
    check_for_world(run, world_size)
    groups = process_groups.start(run.parallel)
    return build_model(run, groups), run, groups


# --- decoders -------------------------------------------------------------------------------------------------------


def generate_with_decoders(folders: dict[str, Path], degrees: dict[str, Any]) -> dict[str, Any]:
    """For each family greedy text, sampled text of two seeds, and greedy text that ends at a given token."""
    made = {}
    for family, folder in folders.items():
        model, run, groups = start(folder, degrees)
        was_training = model.chunks[0].training
        greedy = generate(model, run, groups, random_prompts(), GREEDY)
        end = greedy[0][6]
        made[family] = {
            "greedy": greedy,
            "sampled": generate(model, run, groups, random_prompts(), SAMPLED),
            "sampled alone": generate(model, run, groups, random_prompts()[:1], SAMPLED),
            "another seed": generate(model, run, groups, random_prompts(), SAMPLED.replace(seed=5)),
            "ended": generate(model, run, groups, random_prompts(), GREEDY.replace(eos_token_ids=(end,))),
        }
        assert model.chunks[0].training == was_training
        process_groups.stop()
    return made


@pytest.fixture(scope="module")
def generated(folders: dict[str, tuple[Path, list[list[int]]]]) -> dict[str, list[dict[str, Any]]]:
    """What each rank of each layout generated."""
    paths = {family: folder for family, (folder, _) in folders.items()}
    return {layout: spawn(generate_with_decoders, size, paths, degrees) for layout, (size, degrees) in LAYOUTS.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_transformers(
    folders: dict[str, tuple[Path, list[list[int]]]],
    generated: dict[str, list[dict[str, Any]]],
    family: str,
    layout: str,
) -> None:
    _, reference = folders[family]
    for rank in generated[layout]:
        assert rank[family]["greedy"] == reference


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_text_depends_on_the_seed_alone(generated: dict[str, list[dict[str, Any]]], family: str) -> None:
    ranks = [rank[family] for layout in LAYOUTS for rank in generated[layout]]
    first = ranks[0]
    assert all(rank["sampled"] == first["sampled"] for rank in ranks)
    assert first["sampled alone"] == first["sampled"][:1], "neighbours in the batch must not matter"
    assert first["sampled"] != first["greedy"]
    assert first["sampled"] != first["another seed"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_ends_at_its_first_end_token(generated: dict[str, list[dict[str, Any]]], family: str) -> None:
    for layout in LAYOUTS:
        for rank in generated[layout]:
            end = rank[family]["greedy"][0][6]
            for ended, whole in zip(rank[family]["ended"], rank[family]["greedy"], strict=True):
                assert ended == (whole[: whole.index(end) + 1] if end in whole else whole)
            assert len(rank[family]["ended"][0]) <= 7


# --- InfiMM ---------------------------------------------------------------------------------------------------------


def infimm_prompts(run: RunConfig, blank_images: bool = False) -> list[Prompt]:
    """Text before the first of two images; text alone; an image at once and one at the end; all of other lengths."""
    assert run.infimm is not None
    draw = torch.Generator().manual_seed(11)
    tower, tag = run.infimm.tower, run.infimm.image_token_id
    prompts = []
    for length, tags in ((9, (3, 6)), (4, ()), (12, (0, 11))):
        tokens = torch.randint(3, run.infimm.eoc_token_id, (length,), generator=draw)
        tokens[list(tags)] = tag
        patches = torch.randn(len(tags) * tower.patches, 3 * tower.patch_size**2, generator=draw)
        prompts.append(Prompt(tokens, len(tags), torch.zeros_like(patches) if blank_images else patches))
    return prompts


def infimm_batch(run: RunConfig, prompt: Prompt, answer: list[int]) -> TextBatch:
    """The whole text of one prompt as training would see it; a tag in the answer would count as an image."""
    assert run.infimm is not None and prompt.patches is not None
    assert run.infimm.image_token_id not in answer
    tokens = torch.cat([prompt.tokens, torch.tensor(answer, dtype=torch.int64)])[None]
    seen, has_image = preceding_images(tokens, run.infimm.image_token_id, [prompt.images])
    plain = next_token_batch(tokens)
    media = AttendedMedia(prompt.patches, (1,) * prompt.images, image_of_token=seen, has_image=has_image)
    return TextBatch(plain.tokens, plain.labels, plain.loss_weights, media=media)


def without_cache(
    model: Model, run: RunConfig, groups: Groups, prompts: list[Prompt], settings: SamplingConfig
) -> list[list[int]]:
    """The same text by a full pass, tower included, for each token."""
    answers: list[list[int]] = []
    for row, prompt in enumerate(prompts):
        draws = torch.Generator().manual_seed(settings.seed + row)
        answer: list[int] = []
        for _ in range(settings.max_new_tokens):
            batch = infimm_batch(run, prompt, answer)
            (logits,) = compute_logits(model.chunks, [batch], groups, run.decoder.vocab_size, model.inputs)
            answer.append(choose_token(logits[0, -1], settings, draws))
        answers.append(answer)
    return answers


def open_gates(model: Model) -> None:
    """The fixture's gates are almost closed: open them, so that images decide what is said."""
    for name, parameter in model.chunks[0].named_parameters():
        if name.endswith(("attn_gate", "ff_gate")):
            parameter.data.fill_(0.3)
        elif name.endswith("to_out.weight"):
            parameter.data.mul_(3.0)


def generate_with_infimm(degrees: dict[str, Any]) -> dict[str, list[list[int]]]:
    model, run, groups = start(GOLDEN, degrees)
    open_gates(model)
    prompts = infimm_prompts(run)
    calls: list[int] = []
    assert model.tower is not None
    model.tower.register_forward_hook(lambda *_: calls.append(1))
    greedy = generate(model, run, groups, prompts, GREEDY)
    assert len(calls) == 1, "the tower runs once"
    # Drawn text hardly repeats itself, so it tells more states of the cache apart than greedy text.
    return {
        "greedy": greedy,
        "greedy without cache": without_cache(model, run, groups, prompts, GREEDY),
        "drawn": generate(model, run, groups, prompts, DRAWN),
        "drawn without cache": without_cache(model, run, groups, prompts, DRAWN),
        "drawn alone": generate(model, run, groups, prompts[:1], DRAWN),
        "blank": generate(model, run, groups, infimm_prompts(run, blank_images=True), GREEDY),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_infimm_with_a_cache_says_what_it_says_without(layout: str) -> None:
    world_size, degrees = LAYOUTS[layout]
    for rank in spawn(generate_with_infimm, world_size, degrees):
        assert rank["greedy"] == rank["greedy without cache"]
        assert rank["drawn"] == rank["drawn without cache"]
        assert all(len(set(text)) > NEW // 2 for text in rank["drawn"])
        assert rank["drawn alone"] == rank["drawn"][:1], "neighbours in the batch must not matter"
        is_blind = [seen == blank for seen, blank in zip(rank["greedy"], rank["blank"], strict=True)]
        assert is_blind == [False, True, False], "images must matter where there are any, and nowhere else"


def generate_with_new_tokens(degrees: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Text of a model that trains the new tokens' rows beside its vocabulary, with and without a cache."""
    model, run, groups = start(GOLDEN, degrees, trainable=("cross_attention", "resampler", "new_tokens"))
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.chunks[0].named_parameters():
        if name.startswith("new_"):
            eoc, image = 0, 1
            parameter.data[eoc] = torch.randn(parameter[eoc].shape, generator=draw)
            parameter.data[image] *= 0.5
    prompts = infimm_prompts(run)
    return generate(model, run, groups, prompts, DRAWN), without_cache(model, run, groups, prompts, DRAWN)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_new_tokens_take_part(layout: str) -> None:
    world_size, degrees = LAYOUTS[layout]
    for cached, uncached in spawn(generate_with_new_tokens, world_size, degrees):
        assert cached == uncached
        assert all(126 in text for text in cached), "the trained row decides"


# --- mistakes -------------------------------------------------------------------------------------------------------


def refused_prompts(folder: Path) -> list[str]:
    model, run, groups = start(folder, {})
    five = torch.arange(5)
    refused: list[tuple[RunConfig, Prompt, SamplingConfig]] = [
        (run, Prompt(five[:0]), GREEDY),
        (run, Prompt(five), GREEDY.replace(max_new_tokens=60)),
        (run, Prompt(five + VOCABULARY - 3), GREEDY),
        (run, Prompt(five, images=1), GREEDY),
        (run.replace(parallel=ParallelConfig(pipeline_model_parallel_size=2)), Prompt(five), GREEDY),
        (
            run.replace(parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
            Prompt(five),
            GREEDY,
        ),
    ]
    messages = []
    for its_run, prompt, settings in refused:
        with pytest.raises(MegavlmError) as caught:
            generate(model, its_run, groups, [prompt], settings)
        messages.append(str(caught.value))
    return messages


def test_prompts_and_layouts_that_do_not_fit(folders: dict[str, tuple[Path, list[list[int]]]]) -> None:
    (messages,) = spawn(refused_prompts, 1, folders["llama"][0])
    assert messages == [
        "prompt 0: tokens = 0: there is nothing to go on with; write at least one word",
        "max_new_tokens = 60: with the 5 tokens of prompt 0 goes beyond the decoder's 64 positions; use at most 59",
        "prompt 0: token = 102: the decoder has 101 tokens; take the tokenizer of the model's own folder",
        "prompt 0: images = 1: the model is a decoder alone; leave the images out",
        "parallel.pipeline_model_parallel_size = 2: text is not generated through pipeline stages; "
        "use tensor parallelism instead (--tensor-model-parallel-size)",
        "parallel.sequence_parallel = True: a single token does not divide over ranks; "
        "build the model that generates without it",
    ]


def image_without_a_tag() -> str:
    model, run, groups = start(GOLDEN, {})
    (_, text_alone, _) = infimm_prompts(run)
    assert run.infimm is not None
    tower = run.infimm.tower
    prompt = Prompt(text_alone.tokens, 1, torch.zeros(tower.patches, 3 * tower.patch_size**2))
    with pytest.raises(MegavlmError) as caught:
        generate(model, run, groups, [prompt], GREEDY)
    return str(caught.value)


def test_an_image_without_a_tag_is_refused() -> None:
    (message,) = spawn(image_without_a_tag, 1)
    assert message == "sample 0: tags of images = 0: 1 images come with it; use one tag for each image"
