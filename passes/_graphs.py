"""What passes over an aten graph have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from ssprop_fx._compat import fake_mode_of


def graphs_within(graph_module: GraphModule) -> dict[str, tuple[GraphModule, int]]:
    """A graph and those that its nodes run, nested regions and branches, each with how often one run of the whole runs it.

    By path; a graph's own is ``""``. Of the two branches of a ``torch.cond`` the first counts as the one that runs.
    """
    paths = {module: path for path, module in graph_module.named_modules() if isinstance(module, GraphModule)}
    times = dict.fromkeys(paths, 0)

    def run(graph: GraphModule) -> None:
        times[graph] += 1
        for node in graph.graph.nodes:
            inner = [attribute(graph, n) for n in node.all_input_nodes if n.op == "get_attr"]
            inner = [module for module in inner if isinstance(module, GraphModule)]
            for module in inner[:1] if node.target is torch.ops.higher_order.cond else inner:
                run(module)

    run(graph_module)
    return {path: (graph, times[graph]) for graph, path in paths.items()}


def attribute(graph_module: GraphModule, node: Node) -> Any:
    """What a ``get_attr`` node stands for; None if it is gone."""
    value: Any = graph_module
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value


def rewrite_calls(graph_module: GraphModule, target: Any, rewrite: Callable[[Node], bool]) -> PassResult:
    """Offer every call of ``target`` to ``rewrite``, which says whether it replaced it."""
    changed = [rewrite(node) for node in graph_module.graph.find_nodes(op="call_function", target=target)]
    return settled(graph_module, any(changed))


def settled(graph_module: GraphModule, changed: bool) -> PassResult:
    """The result of a pass; a graph that it changed loses what nobody reads, is checked, and gets its code."""
    if changed:
        graph_module.graph.eliminate_dead_code()
        graph_module.graph.lint()
        graph_module.recompile()
    return PassResult(graph_module, changed)


def call_in_place_of(replaced: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call with the metadata of the node that it replaces, or helps to, and a value of its own."""
    made = replaced.graph.call_function(target, args, kwargs)
    made.meta = dict(replaced.meta)
    values, named = torch.fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
    with fake_mode_of([replaced.meta["val"]]):
        made.meta["val"] = target(*values, **named)
    return made


def has_static_shape(tensor: torch.Tensor) -> bool:
    """Whether every size is a number."""
    return all(isinstance(size, int) for size in tensor.shape)


def converted(replaced: Node, value: Node, dtype: torch.dtype) -> Node:
    """The value in another type; itself if it is of that type."""
    if value.meta["val"].dtype == dtype:
        return value
    return call_in_place_of(replaced, torch.ops.prims.convert_element_type.default, value, dtype)
