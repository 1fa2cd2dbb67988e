"""InfiMM folders: put together from parts, read in all spellings, written by every layout, loaded by transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from eva_cases import TINY, released_state
from infimm_hf import offline
from safetensors.torch import load_file, save_file

from megavlm.build.from_folder import run_from_folder
from megavlm.build.model import build_model
from megavlm.build.run_config import CrossAttentionConfig, ParallelConfig, PrecisionConfig, RunConfig
from megavlm.errors import MegavlmError, WeightsError
from megavlm.export.assemble import assemble_infimm, normalise_infimm
from megavlm.export.hf_export import export_model
from megavlm.infer.cases import Case, case_batches, read_cases
from megavlm.infer.logits import compute_logits
from megavlm.infer.verify import table, verify
from megavlm.model.resampler import ResamplerConfig
from megavlm.parallel import groups as process_groups
from megavlm.testing import spawn

GOLDEN = Path(__file__).parents[1] / "fixtures" / "infimm_zephyr_tiny"

GATED = CrossAttentionConfig(every_n_layers=2)
TOWERS = {name: TINY[name] for name in ("L", "g", "E")}


def float32(run: RunConfig, **degrees: Any) -> RunConfig:
    return run.replace(parallel=ParallelConfig(**degrees), precision=PrecisionConfig(params_dtype="float32"))


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with offline(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA folder, and an EVA-CLIP checkpoint of each kind in its public layout, text tower included."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=100,
        max_position_embeddings=64,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(root / "llm")
    for name, tower in TOWERS.items():
        eyes = released_state(tower, prefix="visual.")
        torch.save(
            {**eyes, "logit_scale": torch.ones(()), "text.positional_embedding": torch.zeros(4, 4)}, root / f"{name}.pt"
        )
    return root


def case_with_images(run: RunConfig) -> Case:
    assert run.infimm is not None
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 90, (2, 16), generator=draw)
    tokens[0, [2, 9]] = run.infimm.image_token_id
    size = run.infimm.tower.image_size
    return Case(tokens, torch.randn(2, 2, 3, size, size, generator=draw))


def logits_of(run: RunConfig, case: Case) -> torch.Tensor:
    process_groups.join()
    groups = process_groups.start(run.parallel)
    model = build_model(run, groups)
    logits = compute_logits(model.chunks, case_batches(case, run), groups, run.decoder.vocab_size, model.inputs)
    process_groups.stop()
    return torch.cat(logits)


def compare_with_the_bare_decoder(assembled: Path, language: Path) -> None:
    with_eyes, bare = float32(run_from_folder(assembled)), float32(run_from_folder(language))
    case = case_with_images(with_eyes)
    plain = Case(case.input_ids.clamp(max=99))
    one_batch_case = Case(plain.input_ids, None)
    assert torch.equal(logits_of(with_eyes, one_batch_case)[..., :100], logits_of(bare, plain))
    # With images the gates are still closed. The new tokens' rows are no part of the decoder, so what comes before
    # the first of them is compared.
    seen = logits_of(with_eyes, case)
    assert torch.equal(seen[0, :2, :100], logits_of(bare, plain)[0, :2])
    assert torch.equal(seen[1, :, :100], logits_of(bare, plain)[1])


@pytest.mark.parametrize("tower", TOWERS)
def test_assembled_with_closed_gates_is_the_decoder(tower: str, parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "infimm"
    vision = parts / f"{tower}.pt"
    assemble_infimm(parts / "llm", vision, TOWERS[tower], "infimm-llama", GATED, out, dtype=torch.float32)
    spawn(compare_with_the_bare_decoder, 1, out, parts / "llm")


def open_gates(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("_gate"):
            tensor.fill_(0.7)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def transformers_cases(folder: Path, file: Path) -> None:
    """What transformers computes with the exported code, recorded in the format of cases."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    case = case_with_images(run_from_folder(folder))
    labels = case.input_ids.clone()
    labels[:, :3] = -100
    output = model(input_ids=case.input_ids, images=case.images, labels=labels)
    output.loss.backward()
    tensors = {
        "case.input_ids": case.input_ids,
        "case.images": case.images,
        "case.labels": labels,
        "case.logits": output.logits.detach(),
        "case.loss": output.loss.detach().reshape(1),
    }
    tensors |= {f"case.grad.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, file)


def verify_under(folder: Path, cases: Path, degrees: dict[str, Any]) -> None:
    process_groups.join()
    run = float32(run_from_folder(folder), **degrees)
    groups = process_groups.start(run.parallel)
    deviations = verify(build_model(run, groups), run, groups, read_cases(cases))
    assert len(deviations) > 20
    assert all(deviation.is_fine for deviation in deviations), "\n" + table(deviations)


@pytest.mark.parametrize("tower, every", [("L", 1), ("g", 1), ("g", 4), ("E", 2), ("E", 4)])
def test_equals_transformers_for_all_towers_and_spacings(tower: str, every: int, parts: Path, tmp_path: Path) -> None:
    gated = CrossAttentionConfig(every_n_layers=every)
    out, cases = tmp_path / "infimm", tmp_path / "cases.safetensors"
    vision = parts / f"{tower}.pt"
    assemble_infimm(parts / "llm", vision, TOWERS[tower], "infimm-llama", gated, out, dtype=torch.float32)
    open_gates(out)
    transformers_cases(out, cases)
    spawn(verify_under, 2, out, cases, {"tensor_model_parallel_size": 2, "sequence_parallel": True})
    spawn(verify_under, 2, out, cases, {"pipeline_model_parallel_size": 2})


def test_equals_transformers_with_sizes_of_its_own(parts: Path, tmp_path: Path) -> None:
    out, cases = tmp_path / "infimm", tmp_path / "cases.safetensors"
    gated = CrossAttentionConfig(every_n_layers=2, heads=4, head_width=12, ff_multiple=3, norm_epsilon=1e-4)
    resampler = ResamplerConfig(
        width=TOWERS["g"].width, depth=3, num_latents=7, heads=2, head_width=20, mlp_ratio=2, norm_epsilon=1e-3
    )
    assemble_infimm(
        *(parts / "llm", parts / "g.pt", TOWERS["g"], "infimm-llama", gated, out),
        dtype=torch.float32,
        resampler=resampler,
    )
    run = run_from_folder(out)
    assert run.infimm is not None and (run.infimm.resampler, run.infimm.cross_attention) == (resampler, gated)
    open_gates(out)
    transformers_cases(out, cases)
    spawn(verify_under, 2, out, cases, {"tensor_model_parallel_size": 2, "sequence_parallel": True})


def test_released_bin_with_doubled_names(tmp_path: Path) -> None:
    released, out = tmp_path / "released", tmp_path / "out"
    doubled = write_released(released)
    normalise_infimm(released, out, torch.float32)
    golden = load_file(GOLDEN / "model.safetensors")
    tables = {name for name in golden if ".rope.freqs_" in name}
    mine = load_file(out / "model.safetensors")
    assert mine.keys() == golden.keys() - tables
    assert all(torch.equal(mine[name], golden[name]) for name in mine)
    assert doubled > 20


def write_released(folder: Path, spoil: bool = False) -> int:
    """The golden model as the released file is: one .bin, with the layers' second names; how many of those."""
    weights = load_file(GOLDEN / "model.safetensors")
    second = {}
    for name, tensor in weights.items():
        for module, alias in (
            ("decoder_layer", "old_decoder_blocks"),
            ("gated_cross_attn_layer", "gated_cross_attn_layers"),
        ):
            if f".{module}." in name:
                number, _, rest = name.removeprefix("model.lang_encoder.model.layers.").partition(f".{module}.")
                second[f"model.lang_encoder.{alias}.{number}.{rest}"] = tensor.clone()
    if spoil:
        next(iter(second.values())).add_(1)
    folder.mkdir()
    torch.save({**weights, **second}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text((GOLDEN / "config.json").read_text())
    return len(second)


def test_second_names_that_differ_are_refused(tmp_path: Path) -> None:
    write_released(tmp_path / "released", spoil=True)
    with pytest.raises(WeightsError, match="is its other name, and the two differ"):
        normalise_infimm(tmp_path / "released", tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


def export_under(degrees: dict[str, Any], out: Path) -> None:
    process_groups.join()
    run = float32(run_from_folder(GOLDEN), **degrees)
    groups = process_groups.start(run.parallel)
    export_model(build_model(run, groups), run, groups, out)


@pytest.mark.parametrize(
    "degrees",
    [
        {"tensor_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tttL", "vision_over": "all_stages"},
    ],
    ids=["TP=2", "interleaved PP=2", "uneven PP=2, all stages encoding"],
)
def test_import_and_export_give_back_every_bit(degrees: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / f"hf-{len(degrees)}"
    spawn(export_under, 2, degrees, out)
    golden = {n: t for n, t in load_file(GOLDEN / "model.safetensors").items() if ".rope.freqs_" not in n}
    mine = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert mine.keys() == golden.keys()
    assert all(torch.equal(mine[name], golden[name]) for name in golden)

    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    for case in read_cases(GOLDEN / "cases.safetensors").values():
        assert case.logits is not None
        with torch.no_grad():
            logits = model(input_ids=case.input_ids, images=case.images).logits
        assert (logits - case.logits).abs().max() <= 1e-4


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.perceiver.latents"]
    save_file(weights, folder / "model.safetensors")


def of_another_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "infimm-gpt"}))


def without_a_key(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["visual"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage, message",
    [
        (without_a_tensor, r"'model.perceiver.latents': 1 of \d+ tensors are missing"),
        (of_another_kind, r"model_type = 'infimm-gpt': is no InfiMM; use one of infimm-zephyr"),
        (without_a_key, r"visual = None: is missing"),
    ],
)
def test_bad_folders_end_in_one_line(damage: Any, message: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.link(GOLDEN / name, broken / name) if name.endswith("tensors") and damage is not without_a_tensor else (
            broken / name
        ).write_bytes((GOLDEN / name).read_bytes())
    damage(broken)
    with pytest.raises(MegavlmError, match=message):
        normalise_infimm(broken, tmp_path / "out", torch.float32)


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(2, 1, 3, 20, 20), r"row 0: tags of images = 2: only 1 images come"),
        (torch.zeros(2, 2, 3, 30, 30), r"row 0: images = \(3, 30, 30\): the tower takes \(3, 20, 20\)"),
    ],
)
def test_images_that_do_not_fit_their_tags(images: torch.Tensor, message: str, parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "infimm"
    assemble_infimm(parts / "llm", parts / "g.pt", TOWERS["g"], "infimm-llama", GATED, out, dtype=torch.float32)
    run = run_from_folder(out)
    case = case_with_images(run)
    case.images = images
    with pytest.raises(MegavlmError, match=message):
        case_batches(case, run)
