"""After a rewrite: nothing selected was missed, nothing rewritten twice, the graph is well formed, metadata kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch.fx import GraphModule

from ssprop_fx import ops
from ssprop_fx.errors import TransformError

from .assign_policy import Decision
from .find_convolutions import find_convolutions


def verify(graph_module: GraphModule, decisions: Sequence[Decision], already: Counter[str] | None = None) -> None:
    """Check a graph that :class:`Sparsify` has rewritten.

    Args:
        already: how many ``ssprop.conv`` of each layer the graph held before.

    Raises:
        TransformError: a bug of the passes; says which layer, so that a report of it is of use.
    """
    graph_module.graph.lint()
    found = rewritten_layers(graph_module)
    wanted = Counter(d.convolution.layer for d in decisions if d.sparse)
    wanted.update(already or Counter())
    problems = []
    for layer in wanted | found:
        if found[layer] < wanted[layer]:
            problems.append(f"{layer} was selected {wanted[layer]} times and rewritten {found[layer]} times")
        elif found[layer] > wanted[layer]:
            problems.append(f"{layer} was rewritten {found[layer]} times, but selected {wanted[layer]} times")
    left = {c.node for c in find_convolutions(graph_module, lambda node, spec: (node.name, False), linear=True)}
    for decision in decisions:
        convolution = decision.convolution
        if decision.sparse and convolution.node in left:
            problems.append(f"{convolution.layer} was selected and is still dense")
        if not decision.sparse and convolution.node not in left:
            problems.append(f"{convolution.layer} was to stay dense and is gone")
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target is ops.conv and decisions and "ssprop" not in node.meta:
            problems.append(f"{node.args[ops.SETTINGS_AT]} lost its metadata")
    if problems:
        raise TransformError("the rewritten graph is wrong (a bug in ssprop-fx): " + "; ".join(problems))


def rewritten_layers(graph_module: GraphModule) -> Counter[str]:
    """How many ``ssprop.conv`` of each layer a graph holds."""
    return Counter(
        node.args[ops.SETTINGS_AT]
        for node in graph_module.graph.nodes
        if node.op == "call_function" and node.target is ops.conv
    )
