"""Sums over everything but the channels → the same in two stages, the first within the cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ._graphs import call_in_place_of, has_static_shape

_aten = torch.ops.aten
_LEAST = 1 << 16  # elements; smaller sums take no time
_ROWS = (16, 32, 8, 64)  # summed at a time, best first: what they hold stays in the first cache


class ChannelsLastSums(PassBase):
    """Sum columns of channels-last data in two stages, on the CPU.

    The gradients of a batch norm, of a bias, and the importance of channels are sums over all dimensions but the one that
    is innermost in memory. Inductor writes each as a loop down one column (of 16 channels) after the other, which reads
    from memory what would be in the cache. Sums over a few rows first, then over their results, read along the memory.

    Requires values in ``meta["val"]``; those of dynamic shape stay as they are. Ensures sums that are equal up to rounding
    and that the graph passes lint.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        sums = graph_module.graph.find_nodes(op="call_function", target=_aten.sum.dim_IntList)
        changed = [_rewrite(node) for node in sums]
        if any(changed):
            graph_module.graph.eliminate_dead_code()
            graph_module.graph.lint()
            graph_module.recompile()
        return PassResult(graph_module, any(changed))


def _rewrite(node: Node) -> bool:
    source: Any = node.args[0]
    tensor = source.meta["val"]
    if tensor.device.type != "cpu" or tensor.dim() < 2 or not has_static_shape(tensor) or tensor.numel() < _LEAST:
        return False
    order = sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d), d))
    reduced = {d % tensor.dim() for d in node.args[1] or range(tensor.dim())}  # type: ignore[union-attr]
    if reduced != set(order[:-1]) or not tensor.permute(order).is_contiguous():
        return False
    channels = tensor.shape[order[-1]]
    positions = math.prod(tensor.shape) // channels
    rows = next((r for r in _ROWS if positions % r == 0), None)
    if rows is None or channels < 8:
        return False
    with node.graph.inserting_before(node):
        matrix = call_in_place_of(node, _aten.permute.default, source, order)
        matrix = call_in_place_of(node, _aten.view.default, matrix, [positions // rows, rows, channels])
        total = call_in_place_of(node, _aten.sum.dim_IntList, matrix, [1], **node.kwargs)
        total = call_in_place_of(node, _aten.sum.dim_IntList, total, [0])
        node.replace_all_uses_with(call_in_place_of(node, _aten.view.default, total, list(node.meta["val"].shape)))
    return True
