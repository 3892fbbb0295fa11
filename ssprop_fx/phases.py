"""A backward pass that compiles itself once for each phase of the schedule."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from . import gather, ops
from ._compat import fake_mode_of, lowering_context
from .allocation import allocation_for, observers
from .logs import backward_lowered
from .passes import ChannelsLastScatter, ChannelsLastSums, LowerBackward, lowering_demands
from .passes.lower_backward import backward_nodes
from .profit import Timing, settle

if TYPE_CHECKING:
    from .backend import GraphRecord

_lock = threading.RLock()


class PhaseDispatcher:
    """A backward callable that compiles itself once for each phase.

    Args:
        graph_module: AOTAutograd's backward graph.
        example_inputs: its fake inputs.
        compiler: (graph, fake inputs) → callable on a list of inputs.
        decompositions: what the compiler expects to have been decomposed.
    """

    def __init__(
        self,
        record: GraphRecord,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        compiler: Callable[..., Any],
        decompositions: Mapping[Any, Any],
    ) -> None:
        self._boxed_call = True  # on the instance: wrappers copy it from there
        self.record, self.graph_module, self.example_inputs = record, graph_module, list(example_inputs)
        self.compiler, self.decompositions = compiler, decompositions
        self.fake_mode = fake_mode_of(self.example_inputs)
        record.backward, record.dispatcher = graph_module, self
        self.demands = lowering_demands(graph_module)
        self.settings = {n: n.args[ops.BACKWARD_SETTINGS_AT :] for n in backward_nodes(graph_module)}
        self.allocations = [allocation_for(h) for h in dict.fromkeys(s[-1] for s in self.settings.values())]
        self.losses: dict[tuple[float, ...], dict[str, Timing]] = {}  # by factors and node: why it stays dense
        self.by_factor: dict[tuple[float, ...], Callable[..., Any]] = {}
        self.by_count: dict[tuple[int, ...], Callable[..., Any]] = {}

    def __call__(self, inputs: list[Any]) -> Any:
        factors = tuple(a.policy.quantized_factor for a in self.allocations)
        run = self.by_factor.get(factors)
        if run is None:
            with _lock:
                run = self.by_factor.get(factors) or self._enter(factors)
        for observe in observers:
            for settings in self.settings.values():
                observe(settings[0])
        return run(inputs)

    def kept(self) -> dict[str, int]:
        """Channels that the next backward pass keeps, by layer (of its first call)."""
        counts = self.counts(tuple(a.policy.quantized_factor for a in self.allocations))
        found: dict[str, int] = {}
        for node, settings in self.settings.items():
            found.setdefault(settings[0], counts[node.name])
        return found

    def _enter(self, factors: tuple[float, ...]) -> Callable[..., Any]:
        counts = self.counts(factors)
        key = tuple(counts.values())
        self.record.phases[factors] = key
        if key not in self.by_count:
            start = time.perf_counter()
            lowered = copy_graph(self.graph_module)
            # the compiler's cache knows the names of our operators, not what they do in this version
            config: Any = torch.compiler.config
            tagged = config.patch(cache_key_tag=f"{config.cache_key_tag} {_operators_digest()}")
            with lowering_context(self.fake_mode), tagged:
                LowerBackward(counts, self.decompositions)(lowered)
                if self.decompositions:  # for Inductor
                    ChannelsLastScatter()(lowered)
                    ChannelsLastSums()(lowered)
                self.record.lowered[key] = copy_graph(lowered)
                self.by_count[key] = self.compiler(lowered, self.example_inputs)
            seconds = self.record.seconds[f"backward {factors}"] = time.perf_counter() - start
            backward_lowered(self.record.index, self.record, factors, self.record.lowered[key], seconds)
        run = self.by_factor[factors] = self.by_count[key]
        return run

    def counts(self, factors: tuple[float, ...]) -> dict[str, int]:
        """Channels to keep, by node, at one factor per allocation."""
        factor_of = {a.handle: f for a, f in zip(self.allocations, factors, strict=True)}
        demands = []
        for node, demand in self.demands.items():
            handle = self.settings[node][-1]
            demands.append(replace(demand, drop_rate=demand.drop_rate * factor_of[handle]))
        counts, self.losses[factors] = settle(demands, any(a.measures for a in self.allocations))
        return {node.name: counts[node.name] for node in self.settings}


@functools.cache
def _operators_digest() -> str:
    return f"ssprop-fx {hashlib.sha256(inspect.getsource(gather).encode()).hexdigest()[:16]}"


def copy_graph(graph_module: GraphModule) -> GraphModule:
    """A copy of a graph module that passes may rewrite; it shares parameters and constants."""
    graph = torch.fx.Graph()
    output = graph.graph_copy(graph_module.graph, {}, return_output_node=True)
    value, old_output = output  # type: ignore[misc]
    graph.output(value).meta = copy.copy(old_output.meta)  # type: ignore[union-attr]
    graph._codegen = graph_module.graph._codegen
    result = GraphModule(graph_module, graph)
    result.meta = copy.copy(graph_module.meta)
    return result
