"""The backward of a max-pool, as Inductor decomposes it → the same with channels last throughout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ssprop_fx.gather import channels_last

from ._graphs import call_in_place_of, converted, has_static_shape, rewrite_calls

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)


class ChannelsLastScatter(PassBase):
    """Sum the gradients of a max-pool over channels-last data where they are, on the CPU.

    Inductor takes the backward of a max-pool apart into a ``scatter_add`` over contiguous planes, (N·C, positions): indices
    and gradients are copied into planes, and the sum is copied back. All of it is as well done over (N, positions, C), where
    the data lies. Nothing else is touched: planes that are read as planes stay.

    Requires values of static shape in ``meta["val"]``. Ensures equal values and that the graph passes lint.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        return rewrite_calls(graph_module, _aten.scatter_add.default, _rewrite)


def _rewrite(node: Node) -> bool:
    zeros, dim, index, source = node.args
    places, values = _behind_planes(index), _behind_planes(source)
    copies = [copy for view in node.users for copy in _channels_last_copies(view)]
    if dim != 1 or not _is_zeros(zeros) or places is None or values is None or not copies or None in copies:
        return False
    n, c, *positions = values.meta["val"].shape
    if places.meta["val"].shape != values.meta["val"].shape or any(copy.meta["val"].shape[:2] != (n, c) for copy in copies):
        return False
    last = [0, *range(2, 2 + len(positions)), 1]
    with node.graph.inserting_before(node):
        place, value = (
            call_in_place_of(node, _aten.view.default, tensor, [n, math.prod(positions), c])
            for tensor in (call_in_place_of(node, _aten.permute.default, tensor, last) for tensor in (places, values))
        )
        start = call_in_place_of(node, _aten.full.default, [n, zeros.args[0][1], c], 0, **zeros.kwargs)
        value = converted(node, value, source.meta["val"].dtype)
        total = call_in_place_of(node, _aten.scatter_add.default, start, 1, place, value)
        for copy in copies:
            sizes = copy.meta["val"].shape[2:]
            apart = call_in_place_of(node, _aten.view.default, total, [n, *sizes, c])
            apart = call_in_place_of(node, _aten.permute.default, apart, [0, len(sizes) + 1, *range(1, len(sizes) + 1)])
            copy.replace_all_uses_with(converted(node, apart, copy.meta["val"].dtype))
    return True


def _behind_planes(node: Any) -> Node | None:
    """The (N, C, *spatial) tensor in channels-last memory that a node shows as contiguous planes, (N·C, positions)."""
    shape = node.meta["val"].shape
    node = _before_conversion(node)
    if not (isinstance(node, Node) and node.target in _VIEWS and isinstance(node.args[0], Node)):
        return None
    behind = node.args[0]
    if behind.target is _aten.clone.default and isinstance(behind.args[0], Node):
        behind = behind.args[0]
    tensor = behind.meta["val"]
    if tensor.device.type != "cpu" or tensor.dim() < 3 or not has_static_shape(tensor):
        return None
    planes = (tensor.shape[0] * tensor.shape[1], math.prod(tensor.shape[2:]))
    return behind if tuple(shape) == planes and channels_last(tensor) else None


def _channels_last_copies(view: Node) -> Iterator[Node | None]:
    """What reads the planes as (N, C, *spatial): its copies in channels-last memory, None for anything else."""
    if view.target not in _VIEWS or not view.users:
        yield None
    for reader in view.users:
        for copy in reader.users if _is_conversion(reader) else [reader]:
            is_copy = copy.target is _aten.clone.default  # the graph's output has no value
            value = copy.meta["val"] if is_copy else None
            yield copy if is_copy and value.shape == view.meta["val"].shape and channels_last(value) else None


def _before_conversion(node: Any) -> Any:
    return node.args[0] if isinstance(node, Node) and _is_conversion(node) else node


def _is_conversion(node: Node) -> bool:
    return node.target is torch.ops.prims.convert_element_type.default


def _is_zeros(node: Any) -> bool:
    return isinstance(node, Node) and node.target is _aten.full.default and node.args[1] == 0 and len(node.args[0]) == 2
