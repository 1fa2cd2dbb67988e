"""Where in the model an operation belongs: its part, its decoder layer, and whether it runs forward or backward.

Modules say it while they run forward. Backward it is asked of the node of autograd's graph that runs: nodes are
numbered in the order in which the forward pass made them, and it is noted at which number each part began.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from megavlm.plan.profile import Phase, PlanPart

BEFORE, BEHIND = -1, 1_000_000
"""Stand in for a layer's number outside of the layers."""

_PARTS_OF_MODULES: dict[str, PlanPart] = {
    "gated": "cross_attention",
    "resampler": "connector",
    "projector": "connector",
    "tower": "tower",
    "output_layer": "head",
}


class Spot(NamedTuple):
    """A part of the model, and the layer of the chunk that it belongs to."""

    part: PlanPart
    layer: int


class Place(NamedTuple):
    """Where and when something happens."""

    part: PlanPart
    layer: int
    phase: Phase


_ENTRANCE, _LAYERS, _EXIT = Spot("connector", BEFORE), Spot("decoder", BEFORE), Spot("head", BEHIND)


class Places:
    """Follows which module runs, once it watches a model's."""

    def __init__(self) -> None:
        self._stack: list[Spot] = []
        self._numbers: list[int] = []
        self._spots: list[Spot] = []
        self._of_parameters: dict[int, Spot] = {}
        self._hooks: list[Any] = []
        self._last: Phase = "forward"
        self.entering: Callable[[int], None] = lambda layer: None
        """Called with the number of each layer whose forward pass begins, and with BEHIND after the last one."""
        self.in_step = False
        """Whether what runs outside of all modules is the optimizer's step."""

    def now(self) -> Place:
        """Where the operation that is about to run belongs."""
        in_backward = torch._C._current_graph_task_id() != -1
        if self._stack:
            self._last = "backward" if in_backward else "forward"
            return Place(*self._stack[-1], "recompute" if in_backward else "forward")
        if in_backward:
            self._last = "backward"
            return Place(*self._spot_of_node(), "backward")
        if self.in_step:
            return Place("optimizer", BEHIND, "step")
        return Place("pipeline", BEHIND, self._last)

    def _spot_of_node(self) -> Spot:
        node = torch._C._current_autograd_node()
        variable = getattr(node, "variable", None)
        if variable is not None:
            return self._of_parameters.get(id(variable), _ENTRANCE)
        if node is None or not self._numbers:
            return _EXIT
        return self._spots[max(bisect_right(self._numbers, node._sequence_nr()) - 1, 0)]

    def watch(self, chunk: nn.Module) -> None:
        """Follow a chunk of a model through its forward passes."""
        block: Any = chunk.decoder
        layers: list[nn.Module] = list(block.layers)
        self._around(chunk, _ENTRANCE)
        self._around(block, _LAYERS)
        for number, layer in enumerate(layers):
            self._around(layer, Spot("decoder", number))
            for name, module in layer.named_children():
                if name in _PARTS_OF_MODULES:
                    self._around(module, Spot(_PARTS_OF_MODULES[name], number))
        for name, module in chunk.named_children():
            if name in _PARTS_OF_MODULES:
                self._around(module, Spot(_PARTS_OF_MODULES[name], BEHIND if name == "output_layer" else BEFORE))
        self._hooks.append(block.register_forward_hook(lambda *_: self._leave_layers()))
        if getattr(block, "final_layernorm", None) is not None:
            self._around(block.final_layernorm, Spot("decoder", BEHIND))
        self._note_parameters(chunk, block, layers)

    def watch_tower(self, tower: nn.Module) -> None:
        """Follow a tower that stands outside of the chunks."""
        self._around(tower, Spot("tower", BEFORE))

    def forget(self) -> None:
        """Forget the graph of the pass before."""
        self._numbers.clear()
        self._spots.clear()

    def unwatch(self) -> None:
        """Take all hooks off again."""
        for hook in self._hooks:
            hook.remove()

    def _note_parameters(self, chunk: nn.Module, block: nn.Module, layers: Iterable[nn.Module]) -> None:
        for name, parameter in chunk.named_parameters():
            first = name.partition(".")[0]
            part = _PARTS_OF_MODULES.get(first, "connector")
            self._of_parameters[id(parameter)] = Spot(part, BEHIND if first == "output_layer" else BEFORE)
        for parameter in block.parameters():
            self._of_parameters[id(parameter)] = Spot("decoder", BEHIND)
        for number, layer in enumerate(layers):
            for name, parameter in layer.named_parameters():
                part = _PARTS_OF_MODULES.get(name.partition(".")[0], "decoder")
                self._of_parameters[id(parameter)] = Spot(part, number)

    def _around(self, module: nn.Module, spot: Spot) -> None:
        """Whatever runs within the module's forward pass belongs to the spot."""

        def enter(*_: Any) -> None:
            if spot.part == "decoder" and 0 <= spot.layer < BEHIND and torch._C._current_graph_task_id() == -1:
                self.entering(spot.layer)
            self._stack.append(spot)
            self._mark(spot)

        def leave(*_: Any) -> None:
            self._stack.pop()
            if self._stack:
                self._mark(self._stack[-1])

        self._hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def _leave_layers(self) -> None:
        """Behind the layers, what the chunk still does is its head."""
        if torch._C._current_graph_task_id() == -1:
            self.entering(BEHIND)
        self._stack[-1] = _EXIT
        self._mark(_EXIT)

    def _mark(self, spot: Spot) -> None:
        self._numbers.append(_next_number())
        self._spots.append(spot)


def _next_number() -> int:
    """The number that the next node of autograd's graph gets."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number
