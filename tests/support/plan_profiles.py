"""Profiles of stages made of round numbers, as a trace of a model with equal layers would give them."""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.build.run_config import ParallelConfig
from megavlm.parallel.layout import AUTO
from megavlm.plan.choice import Choice
from megavlm.plan.cluster import GIB, Cluster
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.profile import CommOp, MemoryUse, OpCost, Phase, RowProfile, StageProfile
from megavlm.plan.step import step_time

FLOPS_PER_SECOND = 1e14
"""Of the rate below."""
KEPT = {"none": 1.0, "selective": 0.5, "full": 0.1}
"""Share of a layer's activations, by recompute."""


def rate(cost: OpCost) -> float:
    """Seconds of computing."""
    return cost.flops / FLOPS_PER_SECOND + cost.bytes / 1e12


@dataclass(frozen=True, kw_only=True)
class MadeModel:
    """What each part costs; of layers and images one, of all tensor-parallel ranks."""

    layers: int = 16
    layer_flops: float = 1e12
    """Forward; backward takes two of it, or one where the layers are frozen."""
    is_frozen: bool = False
    tower_flops: float = 0.0
    head_flops: float = 0.0
    images: tuple[int, int] = (4, 4)
    """Of a mean and of the worst row."""
    lengths: tuple[int, int] = (1000, 1000)
    """Tokens of them, likewise; what layers and head cost is that of a mean row."""
    message: float = 0.0
    """Bytes to the next stage."""
    tensor_message: float = 0.0
    """Bytes of an all-reduce in each layer and way."""
    gradients: float = 0.0
    """Bytes of a stage's gradients."""
    layer_bytes: int = GIB // 2
    activation: int = GIB
    """Of a layer and microbatch."""

    def profiles(self, choice: Choice, data: int) -> list[StageProfile]:
        """Of all stages of a layout with so many data-parallel ranks."""
        own = self.layers // choice.pipeline
        weights = self.layer_bytes * own // choice.tensor
        return [
            StageProfile(
                stage=stage,
                chunks=choice.chunks,
                layers=own,
                in_flight=choice.pipeline - stage,
                parameters=weights // 2,
                trainable=0 if self.is_frozen else weights // 2,
                mean=self._row("mean", choice, stage, data, weights),
                worst=self._row("worst", choice, stage, data, weights),
                long=self._row("long", choice, stage, data, weights),
            )
            for stage in range(choice.pipeline)
        ]

    def _row(self, name: str, choice: Choice, stage: int, data: int, weights: int) -> RowProfile:
        images, length = self.images[name == "worst"], self.lengths[name != "mean"]
        own = self.layers // choice.pipeline
        held = int(self.activation * own * KEPT[choice.recompute] / choice.tensor)
        memory = MemoryUse(
            weights=weights,
            gradients=0 if self.is_frozen else 2 * weights,
            optimizer=0 if self.is_frozen else 6 * weights // data,
            activations=held * (choice.pipeline - stage),
        )
        return RowProfile(
            name=name,
            tokens=length,
            length=length,
            documents=2,
            images=images,
            costs=tuple(self._costs(choice, stage, own, images, length / self.lengths[0])),
            activation_per_microbatch=held,
            transient=0,
            memory=memory,
        )

    def _costs(self, choice: Choice, stage: int, own: int, images: int, longer: float) -> list[OpCost]:
        layer = longer * own * self.layer_flops / choice.tensor
        ways: dict[Phase, float] = {"forward": 1.0, "backward": 1.0 if self.is_frozen else 2.0}
        if choice.recompute == "full":
            ways["recompute"] = 1.0
        costs = [
            OpCost(part="decoder", kind="matmul", phase=way, flops=times * layer, count=own)
            for way, times in ways.items()
        ]
        if stage == 0 and self.tower_flops:
            tower = images * self.tower_flops / choice.tensor
            costs.append(OpCost(part="tower", kind="matmul", phase="forward", flops=tower))
        if stage == choice.pipeline - 1 and self.head_flops:
            head = longer * self.head_flops / choice.tensor
            costs.append(OpCost(part="head", kind="matmul", phase="forward", flops=head))
        if self.tensor_message:
            whole = own * self.tensor_message
            costs += [
                OpCost(part="decoder", kind="comm", phase=way, bytes=whole, count=own, group="tp", op="all_reduce")
                for way in ways
            ]
        if self.message and (stage < choice.pipeline - 1 or choice.chunks > 1):
            whole = choice.chunks * self.message
            costs.append(
                OpCost(
                    part="pipeline",
                    kind="comm",
                    phase="forward",
                    bytes=whole,
                    count=choice.chunks,
                    group="pp",
                    op="p2p",
                )
            )
        if self.gradients:
            ops: list[CommOp] = ["reduce_scatter", "all_gather"]
            costs += [
                OpCost(part="optimizer", kind="comm", phase="step", bytes=self.gradients, group="dp", op=op)
                for op in ops
            ]
            costs.append(OpCost(part="optimizer", kind="memory", phase="step", bytes=4 * self.gradients))
        return costs


def parallel_of(choice: Choice) -> ParallelConfig:
    """As the trainer's settings, even stages."""
    return ParallelConfig(
        tensor_model_parallel_size=choice.tensor,
        pipeline_model_parallel_size=choice.pipeline,
        virtual_pipeline_model_parallel_size=choice.chunks,
        pipeline_model_parallel_layout=AUTO if choice.pipeline > 1 else None,
        vision_over="all_stages" if choice.towers_everywhere else "first_stage",
    )


def evaluated(model: MadeModel, choice: Choice, cluster: Cluster, rows: int = 64) -> Evaluation:
    """A layout judged; a step has so many rows."""
    data = choice.data_parallel(cluster.gpus)
    microbatches = rows // data
    profiles = model.profiles(choice, data)
    step = step_time(profiles, cluster, parallel_of(choice), microbatches, rate)
    times = 2 if model.is_frozen else 3
    flops = rows * (times * model.layers * model.layer_flops + model.images[0] * model.tower_flops)
    return Evaluation(
        choice=choice,
        cluster=cluster,
        profiles=tuple(profiles),
        step=step,
        microbatches=microbatches,
        tokens=rows * 1000.0,
        images=rows * float(model.images[0]),
        samples=rows * 2.0,
        flops=flops,
    )
