"""After a rewrite: nothing selected was missed, nothing rewritten twice, the graph is well formed, metadata was kept."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule

from ssprop_fx import ops
from ssprop_fx.errors import TransformError

from .assign_policy import Decision
from .find_convolutions import find_convolutions


def verify(graph_module: GraphModule, decisions: Sequence[Decision]) -> None:
    """Check a graph that :class:`Sparsify` has rewritten.

    Raises:
        TransformError: a bug of the passes; says which layer, so that a report of it is of use.
    """
    graph_module.graph.lint()
    wanted = [d.convolution.layer for d in decisions if d.sparse]
    rewritten = [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target is ops.conv]
    layers = [n.args[ops.SETTINGS_AT] for n in rewritten]
    problems = [f"{layer} was selected and is not in the graph" for layer in wanted if layer not in layers]
    problems += [
        f"{d.convolution.layer} was rewritten though the policy keeps it dense"
        for d in decisions
        if not d.sparse and d.convolution.node.graph is not graph_module.graph
    ]
    left = {id(c.node) for c in find_convolutions(graph_module)}
    problems += [
        f"{d.convolution.layer} was selected and left dense"
        for d in decisions
        if d.sparse and id(d.convolution.node) in left
    ]
    for node in rewritten:
        source = node.args[0]
        if getattr(source, "target", None) is ops.conv and source.args[ops.SETTINGS_AT] == node.args[ops.SETTINGS_AT]:
            if source.args[1] is node.args[1] and len(source.users) == 1 and source.meta.get("ssprop") is node.meta.get("ssprop"):
                problems.append(f"{node.args[ops.SETTINGS_AT]} was rewritten twice")
    problems += [
        f"{node.args[ops.SETTINGS_AT]} lost its metadata"
        for node in rewritten
        if decisions and "ssprop" not in node.meta and node.args[ops.SETTINGS_AT] in wanted
    ]
    if problems:
        raise TransformError("the rewritten graph is wrong (a bug in ssprop-fx): " + "; ".join(problems))
