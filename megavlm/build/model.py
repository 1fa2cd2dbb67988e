"""The model of a run: its chunks on this process, with their weights, and what feeds them images."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from megavlm.build.costs import balanced_layout
from megavlm.build.families import FolderModel, chunk_builder, frozen_tower, media_inputs, model_of_folder, state_map_of
from megavlm.build.identity import model_identity
from megavlm.build.run_config import RunConfig
from megavlm.checkpoint.fresh import FreshWeights
from megavlm.checkpoint.hf_folder import HFFolder
from megavlm.checkpoint.hf_import import WeightSource, check_folder, load_weights
from megavlm.checkpoint.pretrained import pretrained_weights
from megavlm.checkpoint.sources import AliasedWeights
from megavlm.errors import WeightsError
from megavlm.log import get_logger
from megavlm.model.backend import is_transformer_engine, spec_provider
from megavlm.model.decoder.model import Decoder
from megavlm.model.freeze import freeze_all_but
from megavlm.model.infimm.model import InfiMM
from megavlm.model.precision import check_fp8, forget_fp8_layers, precision_fields
from megavlm.model.state_map import StateMap
from megavlm.parallel.agree import agreed
from megavlm.parallel.groups import Groups
from megavlm.parallel.layout import AUTO, layers_of_chunks, layout_fields
from megavlm.parallel.recompute import check_recompute, check_recompute_units, recompute_fields
from megavlm.parallel.schedule import InputFunction
from megavlm.parallel.stages import build_chunks
from megavlm.platform import machine

logger = get_logger(__name__)


@dataclass(frozen=True)
class Model:
    """This process's part of a model."""

    chunks: list[Decoder]
    """One for each virtual pipeline stage."""
    tower: nn.Module | None = None
    """The frozen vision tower, on the ranks of a model with eyes that encode images."""
    inputs: InputFunction | None = None
    """What `run_schedule` asks for each batch's images; none in a decoder alone."""

    def parts(self) -> list[nn.Module]:
        """All that holds weights here, each under the names of the state map."""
        return [*self.chunks, *([nn.ModuleDict({"tower": self.tower})] if self.tower is not None else [])]


def build_model(run: RunConfig, groups: Groups) -> Model:
    """The model, filled from the run's Hugging Face folder or drawn from its seed, frozen as the run says."""
    with agreed():
        provider = spec_provider(run.transformer_impl)
        chip, capability = machine.chip()
        engine = is_transformer_engine(provider)
        if engine:
            machine.check_transformer_engine()
        elif capability is not None:
            logger.warning(
                "without Transformer Engine attention takes the documents of a row one by one, which is slow: install "
                "the extra megavlm[gpu]"
            )
        check_fp8(run.precision, chip, capability, engine)
        check_recompute(run.recompute, run.precision, capability is not None, engine)
        run = with_layout(run)
        check_recompute_units(run.recompute, layers_of_chunks(run.parallel, run.decoder.num_layers))
    with contextlib.ExitStack() as files:
        # Before memory is taken for what the settings say, it has to be what the files hold.
        source, state_map = _checked_weights(run, groups, files)
        fields = _transformer_fields(run, engine)
        forget_fp8_layers()
        chunks = build_chunks(chunk_builder(run, provider), run.decoder, fields, run.parallel, groups)
        freeze_all_but(chunks, run.trainable)
        tower = frozen_tower(run, groups)
        model = Model(chunks, tower, media_inputs(run, chunks, tower, groups))
        with agreed():
            load_weights(model.parts(), source, state_map, groups.tensor_rank, groups.collection.tp.size())
    for chunk in chunks:
        if isinstance(chunk, InfiMM):
            chunk.take_new_rows()
    return model


def with_layout(run: RunConfig) -> RunConfig:
    """The run with its pipeline layout spelled out, where it asks for the one that is cut by cost."""
    if run.parallel.pipeline_model_parallel_layout != AUTO:
        return run
    layout = balanced_layout(run, run.train.images_per_row)
    return run.replace(parallel=run.parallel.replace(pipeline_model_parallel_layout=layout))


def _transformer_fields(run: RunConfig, engine: bool) -> dict[str, Any]:
    return {
        **layout_fields(run.parallel, run.precision.dtype, machine.backend()),
        **precision_fields(run.precision),
        **recompute_fields(run.recompute),
        **machine.fused_parts(engine, run.precision.dtype),
        # The gradient is that of (sum of losses) / (sum of target tokens) over the global batch, in every layout.
        "calculate_per_token_loss": True,
    }


def _checked_weights(run: RunConfig, groups: Groups, files: contextlib.ExitStack) -> tuple[WeightSource, StateMap]:
    """The run's weights, all there and in the model's shapes, and their table; files stay open with `files`."""
    state_map = state_map_of(run)
    source: WeightSource
    checkpoint = run.weights.pretrained_checkpoint
    if checkpoint is not None:
        source = files.enter_context(pretrained_weights(checkpoint, state_map, model_identity(run), groups))
        logger.info("starting from the weights of %s", source.folder)
    with agreed():
        if run.weights.load_hf is not None:
            folder = files.enter_context(HFFolder.open(run.weights.load_hf))
            state_map = state_map_of(run, _check_config(folder, run).spelling)
            source = AliasedWeights(folder, state_map.aliases, run.weights.load_hf)
        elif checkpoint is None:
            logger.info("starting from random weights: neither --load-hf nor --pretrained-checkpoint names others")
            source = FreshWeights(state_map, run.train.seed, run.decoder.init_method_std)
        check_folder(source, state_map, run.weights.load_hf or checkpoint or "fresh weights")
    return source, state_map


def _check_config(folder: HFFolder, run: RunConfig) -> FolderModel:
    """Refuse a folder of another model before its shapes are compared: the reason reads better."""
    where = f"{folder.path}/config.json"
    found = model_of_folder(folder)
    # A run may cut its images otherwise than the stage before it did.
    same_grid = found.aquila_vl and run.aquila_vl and found.aquila_vl.replace(grid=run.aquila_vl.grid)
    for part, held, asked in (("infimm", found.infimm, run.infimm), ("aquila_vl", same_grid, run.aquila_vl)):
        if held != asked:
            kind = folder.config.get("model_type")
            problem = f"describes another model than the run's settings of {part}"
            raise WeightsError(where, kind, problem, "take the folder of that model")
    for name in ("family", "num_layers", "num_attention_heads", "num_query_groups", "rotary_base", "tied_embeddings"):
        if getattr(found.decoder, name) != getattr(run.decoder, name):
            raise WeightsError(
                f"{where}: {name}",
                getattr(found.decoder, name),
                f"the run's decoder has {getattr(run.decoder, name)!r}",
                f"take the folder of that model, or set decoder.{name}",
            )
    return found
