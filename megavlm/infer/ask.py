"""One question to a Hugging Face folder or a checkpoint: the settings of `megavlm generate`, and what they come to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

from megavlm.build.from_checkpoint import run_from_checkpoint
from megavlm.build.from_folder import run_from_folder
from megavlm.build.model import build_model
from megavlm.build.run_config import ParallelConfig, PrecisionConfig, RunConfig, check_degrees
from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.config import Config, option
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import ConfigError
from megavlm.infer.generate import check_generation, generate
from megavlm.infer.prompt import Prompt, read_prompt
from megavlm.infer.sampling import SamplingConfig
from megavlm.parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Config):
    """What is asked."""

    hf: str = ""
    """Hugging Face folder of the model, with its tokenizer."""
    load_from: str = option("", name="--load")
    """In its place: a folder that --save has filled, or one checkpoint in it."""
    tokenizer: str | None = None
    """Folder of the tokenizer; none: that of the folder, or the one that the checkpoint was trained with."""
    prompt: str = ""
    """The text to go on with; `<image>` where an image belongs."""
    image: tuple[str, ...] = ()
    """Picture files, in the order of the tags."""
    video: tuple[str, ...] = ()
    """Folders of a video's frames, or animated pictures, for the tags `<video>`."""
    chat: bool = False
    """Ask the prompt as a question, in the chat format of the folder, or of the checkpoint's training."""
    json: bool = False
    """Print one line of JSON: text, token_ids, prompt_token_ids."""
    params_dtype: Literal["float32", "bfloat16"] | None = option(None, name="--params-dtype")
    """Number format of weights and activations; none: float32 if it is theirs, else bfloat16."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Length of the answer and choice of its tokens."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Degrees of parallelism; pipeline stages are refused, and sequence parallelism is left out."""


@dataclass(frozen=True)
class Question:
    """A checked question, before any weight is read."""

    config: GenerateConfig
    run: RunConfig
    tokenizer: Tokenizer
    prompt: Prompt


def read_question(config: GenerateConfig, world_size: int) -> Question:
    """Find all that is wrong with the question, its images, the folder and the layout."""
    remedy = "write megavlm generate --hf FOLDER --prompt TEXT, or --load CHECKPOINT for --hf FOLDER"
    for name, value in (("--hf", config.hf or config.load_from), ("--prompt", config.prompt)):
        if not value:
            raise ConfigError(name, value, "is missing", remedy)
    if config.hf and config.load_from:
        raise ConfigError(
            "--load", config.load_from, "stands beside --hf, and one model is asked", "leave one of them out"
        )
    run, folder = _model(config)
    run = run.replace(
        parallel=config.parallel.replace(sequence_parallel=False),
        precision=run.precision.replace(params_dtype=config.params_dtype or run.precision.params_dtype),
    )
    check_degrees(run, world_size)
    tokenizer = _tokenizer(config.tokenizer or folder)
    prompt = read_prompt(config.prompt, config.image, config.video, run, tokenizer, config.chat)
    if not config.hf and config.sampling.eos_token_ids is None:
        config = config.replace(sampling=config.sampling.replace(eos_token_ids=_end(tokenizer)))
    check_generation(run, [prompt], config.sampling)
    return Question(config, run, tokenizer, prompt)


def _model(config: GenerateConfig) -> tuple[RunConfig, str | None]:
    """What is asked, in its own number format, and where its tokenizer lies."""
    if not config.hf:
        return run_from_checkpoint(config.load_from)
    run = run_from_folder(config.hf)
    return run.replace(precision=PrecisionConfig(params_dtype=_dtype_of(config.hf))), config.hf


def _tokenizer(folder: str | None) -> Tokenizer:
    if folder is None:
        problem = "is missing: the checkpoint's run had no tokenizer"
        raise ConfigError("--tokenizer", None, problem, "name a folder with the model's tokenizer")
    return Tokenizer(folder)


def _end(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token that ends a text, for a checkpoint has no list of them."""
    token = tokenizer.token_of(tokenizer.end)
    return () if token is None else (token,)


def answer_question(question: Question, groups: Groups) -> str:
    """The line or lines to print, the same on every rank."""
    model = build_model(question.run, groups)
    (tokens,) = generate(model, question.run, groups, [question.prompt], question.config.sampling)
    text = question.tokenizer.decode(tokens)
    if not question.config.json:
        return text
    return json.dumps(
        {"text": text, "token_ids": tokens, "prompt_token_ids": question.prompt.tokens.tolist()}, ensure_ascii=False
    )


def _dtype_of(path: str) -> Literal["float32", "bfloat16"]:
    with HFFolder.open(path) as folder:
        # transformers 5 writes `dtype`, older ones `torch_dtype`.
        found = folder.config.get("dtype", folder.config.get("torch_dtype"))
    return "float32" if found == "float32" else "bfloat16"
