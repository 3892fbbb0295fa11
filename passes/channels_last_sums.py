"""Sums over everything but the channels → the same in two stages, the first within the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ._graphs import call_in_place_of, converted, has_static_shape, rewrite_calls

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
        return rewrite_calls(graph_module, _aten.sum.dim_IntList, _rewrite)


def order_of_columns(node: Node) -> list[int] | None:
    """The summed tensor's dimensions in the order of memory, if it is columns that a sum is over, on the CPU; else None."""
    source: Any = node.args[0]
    tensor = source.meta["val"]
    if tensor.device.type != "cpu" or tensor.dim() < 2 or not has_static_shape(tensor) or tensor.numel() < _LEAST:
        return None
    order = sorted(range(tensor.dim()), key=lambda d: (-tensor.stride(d), d))
    reduced = {d % tensor.dim() for d in node.args[1] or range(tensor.dim())}  # type: ignore[union-attr]
    return order if reduced == set(order[:-1]) and tensor.permute(order).is_contiguous() else None


def _rewrite(node: Node) -> bool:
    source: Any = node.args[0]
    order, tensor, result = order_of_columns(node), source.meta["val"], node.meta["val"]
    if order is None:
        return False
    channels = tensor.shape[order[-1]]
    positions = tensor.numel() // channels
    rows = next((r for r in _ROWS if positions % r == 0), None)
    if rows is None or channels < 8:
        return False
    with node.graph.inserting_before(node):
        matrix = call_in_place_of(node, _aten.permute.default, source, order)
        matrix = call_in_place_of(node, _aten.view.default, matrix, [positions // rows, rows, channels])
        # the sums of the first stage must not be rounded to half precision
        between = torch.float32 if result.dtype in (torch.bfloat16, torch.float16) else result.dtype
        total = call_in_place_of(node, _aten.sum.dim_IntList, matrix, [1], dtype=between)
        total = converted(node, call_in_place_of(node, _aten.sum.dim_IntList, total, [0]), result.dtype)
        node.replace_all_uses_with(call_in_place_of(node, _aten.view.default, total, list(result.shape)))
    return True
