"""The model of a run: its chunks on this process, with their weights."""

from __future__ import annotations

import contextlib

from megavlm.build.run_config import RunConfig
from megavlm.checkpoint.fresh import FreshWeights
from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.checkpoint.hf_import import WeightSource, check_folder, load_weights
from megavlm.errors import WeightsError
from megavlm.model.backend import is_transformer_engine, spec_provider
from megavlm.model.decoder.config import DecoderConfig
from megavlm.model.decoder.model import Decoder
from megavlm.model.decoder.state_map import decoder_state_map
from megavlm.model.precision import check_fp8, precision_fields
from megavlm.parallel.agree import agreed
from megavlm.parallel.groups import Groups
from megavlm.parallel.layout import layout_fields
from megavlm.parallel.recompute import check_recompute, recompute_fields
from megavlm.parallel.stages import build_chunks
from megavlm.platform import machine


def build_model(run: RunConfig, groups: Groups) -> list[Decoder]:
    """This process's chunks, filled from the run's Hugging Face folder or drawn from its seed."""
    with agreed():
        provider = spec_provider(run.transformer_impl)
        chip, capability = machine.chip()
        engine = is_transformer_engine(provider)
        check_fp8(run.precision, chip, capability, engine)
        check_recompute(run.recompute, capability is not None, engine)
    fields = {
        **layout_fields(run.parallel, run.precision.dtype, machine.backend()),
        **precision_fields(run.precision),
        **recompute_fields(run.recompute),
        **machine.fused_parts(engine),
        # The gradient is that of (sum of losses) / (sum of target tokens) over the global batch, in every layout.
        "calculate_per_token_loss": True,
    }
    chunks = build_chunks(run.decoder, fields, run.parallel, groups, provider, run.make_vocab_size_divisible_by)
    _fill(chunks, run, groups)
    return chunks


def _fill(chunks: list[Decoder], run: RunConfig, groups: Groups) -> None:
    state_map = decoder_state_map(run.decoder)
    with contextlib.ExitStack() as files, agreed():
        source: WeightSource
        if run.weights.load_hf is None:
            source = FreshWeights(state_map, run.train.seed, run.decoder.init_method_std)
        else:
            source = files.enter_context(HFFolder.open(run.weights.load_hf))
            _check_config(source, run)
        check_folder(source, state_map, run.weights.load_hf or "fresh weights")
        load_weights(chunks, source, state_map, groups.tensor_rank, groups.collection.tp.size())


def _check_config(folder: HFFolder, run: RunConfig) -> None:
    """Refuse a folder of another model before its shapes are compared: the reason reads better."""
    assert run.weights.load_hf is not None
    found = DecoderConfig.from_hf(folder.config, f"{run.weights.load_hf}/config.json")
    for name in ("family", "num_layers", "num_attention_heads", "num_query_groups", "rotary_base", "tied_embeddings"):
        if getattr(found, name) != getattr(run.decoder, name):
            raise WeightsError(
                f"{run.weights.load_hf}/config.json: {name}",
                getattr(found, name),
                f"the run's decoder has {getattr(run.decoder, name)!r}",
                f"take the folder of that model, or set decoder.{name}",
            )
