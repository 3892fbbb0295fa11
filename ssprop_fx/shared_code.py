"""Compiled code that runs for several modules: whose layers a call is about, and whether the policy treats them alike.

Dynamo compiles once for all modules that look alike to it: blocks that are compiled one by one, a region that is marked as
nested, a compiled function that gets one model after another. Names and settings in the graph are those of the module that
came first. :class:`SharedCode` looks at the tensors that a call brings, finds the modules that hold them, and asks the policy
again: where it says the same, the code may serve, and the report lists the layers under their own names; where it does not,
the call is refused. Where the options name a file or hold a mapping, each model has a policy, and so a clock, of its own: the
code then follows that of the model that it was called for last.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from ._compat import graph_argument
from .errors import SSPropError
from .naming import ModuleIndex
from .passes._graphs import attribute
from .policy import Policy, Settings

if TYPE_CHECKING:
    from .passes import Decision


@dataclass(frozen=True)
class Anchor:
    """An input of the graph that tells whose code is run: a tensor of the module ``owner``, known there as ``path``.

    Attributes:
        position: of the tensor among the graph's inputs.
        decisions: those for the convolutions that the owner makes.
        parameter: whether the tensor that Dynamo saw there was a parameter.
        known: the tensors that the code may run for, by identity.
    """

    position: int
    owner: str
    path: str
    decisions: Sequence[Decision]
    parameter: bool
    known: dict[int, weakref.ref[Tensor]]

    def serves(self, tensor: Any) -> bool:
        """Whether the tensor was met before and found to be right."""
        ref = self.known.get(id(tensor))
        return ref is not None and ref() is tensor


@dataclass(frozen=True)
class Instance:
    """Further modules that the code has run for: their root, and for each layer of the graph the name and settings there.

    Attributes:
        policy: the root's.
    """

    root: weakref.ref[nn.Module]
    policy: Policy
    layers: Mapping[str, tuple[str, Settings]]


class SharedCode:
    """The modules that one compiled graph runs for.

    Args:
        anchors: each with the tensor that it has now, which is not kept.
        policy: of the model that came first.
        meet: called with the root of each further one; gives its policy, of the same contents.

    Attributes:
        in_force: the policy of the model that the code was called for last.

    Raises:
        SSPropError: a region inside the graph runs for modules that the policy treats differently.
    """

    def __init__(
        self, anchors: Sequence[tuple[Anchor, Tensor]], policy: Policy, index: ModuleIndex, meet: Callable[[nn.Module], Policy]
    ) -> None:
        self.anchors = [anchor for anchor, _ in anchors]
        self.policy, self.index, self.meet = policy, index, meet
        self.in_force = policy
        self._policies: dict[int, Policy] = {}  # by the identity of a tensor, of those that are not the first model's
        self.instances: list[Instance] = []
        for anchor, tensor in anchors:
            self._check(anchor, tensor)

    def guard(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled``, with every call checked first."""
        if not self.anchors:
            return compiled

        def checked(*inputs: Any) -> Any:
            for anchor in self.anchors:
                self._check(anchor, inputs[anchor.position])
            if self._policies:
                self.in_force = self._policies.get(id(inputs[self.anchors[0].position]), self.policy)
            return compiled(*inputs)

        return checked

    def names_of(self, layer: str, root: nn.Module) -> Iterator[tuple[str, Settings]]:
        """Under which names, and by which settings, the graph's ``layer`` has run for further modules of ``root``."""
        for instance in self.instances:
            if instance.root() is root and layer in instance.layers:
                yield instance.layers[layer]

    def policy_of(self, root: nn.Module) -> Policy:
        """The policy that the code follows for a model that it has run for."""
        return next((instance.policy for instance in self.instances if instance.root() is root), self.policy)

    def share(self, layer: str, times: int) -> int:
        """How many of the ``times`` that the graph runs its ``layer`` are each module's own."""
        names = {layer, *(instance.layers[layer][0] for instance in self.instances if layer in instance.layers)}
        return max(1, times // len(names))

    def _check(self, anchor: Anchor, tensor: Any) -> None:
        if anchor.serves(tensor) or (anchor.parameter and not isinstance(tensor, nn.Parameter)):
            return  # what is no parameter was put in a parameter's place, by torch.func.functional_call for one
        problems: list[str] = []
        self._policies.pop(id(tensor), None)  # another tensor's that is gone
        for holder, name in self.index.holders(tensor):
            full = f".{self.index.name(holder)}.{name}"
            if not full.endswith(f".{anchor.path}"):
                continue
            layers = self._layers(anchor, full.removesuffix(f".{anchor.path}").lstrip("."))
            problem = _disagreement(anchor, layers)
            if problem is None:
                root = self.index.root(holder)
                policy = self.meet(root)
                if policy is not self.policy:
                    self._policies[id(tensor)] = policy
                self.instances.append(Instance(weakref.ref(root), policy, layers))
                break
            problems.append(problem)
        else:
            if problems:
                raise SSPropError(problems[0])
        anchor.known[id(tensor)] = weakref.ref(tensor)

    def _layers(self, anchor: Anchor, owner: str) -> dict[str, tuple[str, Settings]]:
        here = {d.convolution.layer: d.convolution.kinds for d in anchor.decisions}
        there = {layer: owner + layer.removeprefix(anchor.owner) for layer in here}
        settings = self.policy.assign({there[layer]: kinds for layer, kinds in here.items()}, require_match=False)
        return {layer: (name, settings[name]) for layer, name in there.items()}


def _disagreement(anchor: Anchor, layers: Mapping[str, tuple[str, Settings]]) -> str | None:
    for decision in anchor.decisions:
        first, ours = decision.convolution.layer, decision.settings
        name, theirs = layers[first]
        if replace(theirs, rule=ours.rule) != ours:
            return (
                f"the code compiled for the layer {first!r} is run for {name!r}, and the policy treats the two differently "
                f"(drop rate {ours.drop_rate:g} by {ours.rule}, {theirs.drop_rate:g} by {theirs.rule}): torch.compile shares "
                "code between modules that look alike to it. Call model = ssprop_fx.transform(model, policy) first and "
                "compile the result, or write rules that treat the two alike"
            )
    return None


class GraphInputs:
    """The inputs of a whole graph, and which of them a placeholder of a graph inside it stands for.

    Several, where the inner graph is called several times.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self.top = graph_module
        self.positions = {node: i for i, node in enumerate(graph_module.graph.find_nodes(op="placeholder"))}
        self.calls: dict[GraphModule, list[tuple[GraphModule, Node]]] = {}
        for graph in graph_module.modules():
            if isinstance(graph, GraphModule):
                for node in graph.graph.find_nodes(op="get_attr"):
                    inner = attribute(graph, node)
                    if isinstance(inner, GraphModule):
                        self.calls.setdefault(inner, []).extend((graph, user) for user in node.users)

    def behind(self, graph: GraphModule, placeholder: Node) -> Iterator[tuple[int, Tensor]]:
        """Position and tensor of each input of the whole graph that the placeholder stands for, in the order of the calls.

        Dynamo's placeholders know the tensors while the backend runs.
        """
        if graph is self.top:
            _, example = graph_argument(placeholder)
            if example is not None:
                yield self.positions[placeholder], example
            return
        mine = graph.graph.find_nodes(op="placeholder")
        for outer, call in self.calls.get(graph, ()):
            operands = tree_leaves(call.args)[-len(mine) :]  # every operator that takes a graph has its operands last
            if len(operands) == len(mine):
                operand = operands[mine.index(placeholder)]
                if isinstance(operand, Node) and operand.op == "placeholder":
                    yield from self.behind(outer, operand)


def find_anchors(
    graph: GraphModule, decisions: Sequence[Decision], owners: Mapping[str, nn.Module], inputs: GraphInputs
) -> Iterator[tuple[Anchor, Tensor]]:
    """One anchor for each module that makes convolutions in ``graph`` and each call of ``graph``, and the tensor there now.

    A module none of whose parameters and buffers is an input has none: nothing tells it from its like.

    Args:
        decisions: for the graph's convolutions.
        owners: layer name → the module that makes the call.
    """
    of_owner: dict[str, list[Decision]] = {}
    for decision in decisions:
        of_owner.setdefault(decision.convolution.layer.partition("#")[0], []).append(decision)
    behind = [list(inputs.behind(graph, node)) for node in graph.graph.find_nodes(op="placeholder")] if decisions else []
    for owner, found in of_owner.items():
        module = owners.get(found[0].convolution.layer)
        if module is None:
            continue
        distinct = list({d.convolution.layer: d for d in found}.values())
        for tensors in (module.named_parameters(), module.named_buffers()):
            paths = {id(tensor): path for path, tensor in tensors}
            calls = next((c for c in behind if any(id(t) in paths for _, t in c)), None)
            if calls is not None:
                own = next(t for _, t in calls if id(t) in paths)
                known = {id(own): weakref.ref(own)}
                for position, tensor in calls:
                    is_parameter = isinstance(tensor, nn.Parameter)
                    yield Anchor(position, owner, paths[id(own)], distinct, is_parameter, dict(known)), tensor
                break


__all__ = ["Anchor", "GraphInputs", "Instance", "SharedCode", "find_anchors"]
