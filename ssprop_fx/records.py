"""What the backend knows of the graphs that it made: a record for each, by policy and by model."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from .allocation import Allocation
from .naming import plain_modules
from .passes import Decision
from .phases import LazyGraphs, PhaseDispatcher, events
from .policy import Policy, Settings
from .shared_code import SharedCode


@dataclass
class GraphRecord:
    """What the backend did to one Dynamo graph, for reports and tests.

    Attributes:
        captured: the graph as Dynamo handed it over, before any pass.
        rewritten: after the passes.
        decisions: one per convolution, in the graph's order.
        roots: the models that the graph's modules belong to.
        graphs: ``forward`` and ``backward``, once the compiler behind got them; see the properties of these names.
        lowered: kept counts by node of a phase → the backward graph as lowered for it.
        compile_id: Dynamo's, ``0/1``.
        index: number of the graph among those of its policy.
        number: larger than that of graphs made before, and than ``ran`` of those run before.
        forward_compiles: how often the forward was compiled.
        seconds: compile times, ``forward`` and one entry per phase.
        shared: the further modules that the code has run for.
        ran: the graph whose backward pass was run last has the largest.
    """

    captured: GraphModule
    rewritten: GraphModule
    decisions: list[Decision]
    roots: list[weakref.ref]
    shared: SharedCode
    graphs: LazyGraphs = field(default_factory=LazyGraphs)
    lowered: LazyGraphs = field(default_factory=LazyGraphs)
    phases: dict[tuple[float, ...], tuple[int, ...]] = field(default_factory=dict)
    forward_compiles: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    dispatcher: PhaseDispatcher | None = None
    compile_id: Any = None
    index: int = 0
    ran: int = -1
    number: int = field(default_factory=events.__next__)

    @property
    def forward(self) -> GraphModule | None:
        """The forward graph that the compiler behind got; None before it did."""
        return self.graphs.get("forward")

    @property
    def backward(self) -> GraphModule | None:
        """The backward graph, with its ``ssprop.conv_backward`` nodes; None before the first backward pass."""
        return self.graphs.get("backward")

    @property
    def frame(self) -> str:
        """Dynamo's number of the code that was captured; a recompilation of it has the same."""
        return str(self.compile_id).split("/")[0] if self.compile_id is not None else ""

    def withdraw(self) -> None:
        """Take the record back: the graph did not compile, and whatever runs it runs it without us."""
        state = state_of(self.shared.policy)
        state.records = [record for record in state.records if record is not self]

    def layers(self) -> set[str]:
        """The layers with a convolution in the graph."""
        return {d.convolution.layer for d in self.decisions}

    @property
    def alive(self) -> bool:
        """Whether any model is left whose modules the graph has, or has run for."""
        refs = [*self.roots, *(i.root for i in self.shared.instances)]
        return not refs or any(ref() is not None for ref in refs)

    def serves(self, root: torch.nn.Module) -> bool:
        """Whether the graph has modules of the model ``root``, or has run for some."""
        return any(ref() is root for ref in (*self.roots, *(i.root for i in self.shared.instances)))

    def names_of(self, decision: Decision, root: torch.nn.Module) -> Iterator[tuple[str, Settings]]:
        """The layers of the model ``root`` that the decision's convolution stands for, with their settings."""
        if any(ref() is root for ref in self.roots) and self._is_of(decision.convolution.layer, root):
            yield decision.convolution.layer, decision.settings
        yield from self.shared.names_of(decision.convolution.layer, root)

    def _is_of(self, layer: str, root: torch.nn.Module) -> bool:
        """Whether a layer is the model's, of several that the graph has modules of; of what none has a module, each is."""
        owner = layer.partition("#")[0]
        models = [model for ref in self.roots if (model := ref()) is not None]
        if len(models) == 1:
            return True
        having = [model for model in models if any(name == owner for name, _ in plain_modules(model))]
        return not having or any(model is root for model in having)

    def clock_of(self, policy: Policy) -> Policy:
        """The policy whose clock counts where the graph names ``policy``: that of the model that the code runs for."""
        return self.shared.in_force if policy is self.shared.policy else policy

    def stages(self) -> dict[str, GraphModule]:
        """The graphs by stage, in the order in which they were made."""
        found = {"captured": self.captured, "rewritten": self.rewritten}
        found |= {name: self.graphs[name] for name in ("forward", "backward") if name in self.graphs}
        # phases of equal counts share a graph
        phases = {", ".join(f"{f:g}" for f in factors): counts for factors, counts in self.phases.items()}
        return found | {f"backward, factor {name}": self.lowered[c] for name, c in phases.items() if c in self.lowered}

    @property
    def backward_compiles(self) -> int:
        """How many backward graphs were compiled, one per phase that was met."""
        return len(self.lowered)


class CompiledState:
    """What the backend knows of one policy: its allocation, and a record per graph."""

    def __init__(self, policy: Policy) -> None:
        self.allocation = Allocation(policy)
        self.records: list[GraphRecord] = []
        self.checked: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


_policies: weakref.WeakSet[Policy] = weakref.WeakSet()  # those with a state, which refers to its policy and lies in it
_lock = threading.RLock()


def state_of(policy: Policy) -> CompiledState:
    """The backend's state for a policy, made on first use."""
    with _lock:
        if policy.compiled is None:
            policy.compiled = CompiledState(policy)
            _policies.add(policy)
        return policy.compiled


def records_of(model: torch.nn.Module) -> list[tuple[Policy, GraphRecord]]:
    """The graphs that the backend compiled for a model, oldest first, with the policy of each.

    Where the model was compiled more than once, those of the policy that it was compiled with or trained by last.
    """
    records = [record for policy in list(_policies) for record in state_of(policy).records if record.serves(model)]
    records.sort(key=lambda record: record.number)
    found = [(record.shared.policy_of(model), record) for record in records]
    last = max(found, key=lambda pair: max(pair[1].ran, pair[1].number), default=None)
    return [pair for pair in found if last is not None and pair[0] is last[0]]


def compiled_models() -> Iterator[torch.nn.Module]:
    """The models that graphs were compiled for, or have run for."""
    for policy in list(_policies):
        for record in state_of(policy).records:
            for ref in (*record.roots, *(instance.root for instance in record.shared.instances)):
                if (model := ref()) is not None:
                    yield model


__all__ = ["CompiledState", "GraphRecord", "compiled_models", "records_of", "state_of"]
