"""The sums of a batch norm's backward pass → one operator that reads gradient and input once, along memory."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from ssprop_fx import centered, native
from ssprop_fx._compat import memory_order_operator

from ._graphs import call_in_place_of, settled
from .channels_last_sums import order_of_columns

_aten = torch.ops.aten
_VIEWS = {_aten.unsqueeze.default, _aten.squeeze.dims, _aten.squeeze.dim, _aten.view.default, _aten.reshape.default}


class BatchNormSums(PassBase):
    """Write Σ G and Σ G · (x − mean) over batch and space of float32 channels-last data as ``ssprop::centered_sums``.

    That is what a batch norm's backward pass begins with. In code that Inductor generates for them the sums go down one column
    of channels after the other, and take twice as long as memory needs. Where two norms have one gradient, those of a block's
    last layer and of its shortcut, one call serves both. A gradient that is computed from x, an activation's whose input is
    made again, stays generated code: to read x for it, and once more for the sums, would cost what is gained.

    Requires values in ``meta["val"]``. Leaves everything as it is where the loops in C are not built. Ensures sums that are
    equal up to rounding and that the graph passes lint.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        if native.library is None:
            return PassResult(graph_module, False)
        place = {node: i for i, node in enumerate(graph_module.graph.nodes)}
        plain: dict[Node, list[Node]] = {}  # by gradient: its sums, and those of its products with what is centered
        products: dict[Node, list[tuple[Node, Node, Node]]] = {}
        for node in graph_module.graph.find_nodes(op="call_function", target=_aten.sum.dim_IntList):
            source: Any = node.args[0]
            if not _served(node):
                continue
            plain.setdefault(source, []).append(node)
            for grad, other in _factors(source):
                if (found := _centered(other)) and _alike(grad, found[0], source) and found[0] not in _read_for(grad):
                    products.setdefault(grad, []).append((node, *found))
                    break
        changed = [_rewrite(grad, plain.get(grad, []), sums, place) for grad, sums in products.items()]
        return settled(graph_module, any(changed))


def _served(node: Node) -> bool:
    source: Any = node.args[0]
    order = order_of_columns(node)
    types = {source.meta["val"].dtype, node.meta["val"].dtype}
    return order is not None and order[-1] == 1 and types == {torch.float32}


def _factors(source: Node) -> list[tuple[Node, Node]]:
    """The factors of a product, either of them first."""
    factors: Any = source.args[:2]
    product = source.target is _aten.mul.Tensor and all(isinstance(factor, Node) for factor in factors)
    return [tuple(factors), tuple(reversed(factors))] if product else []


def _centered(node: Node) -> tuple[Node, Node] | None:
    """x and the mean, (C,), of x − mean; None of anything else, or of an x that a kernel would have to write first."""
    if node.target is not _aten.sub.Tensor or node.kwargs or not all(isinstance(arg, Node) for arg in node.args):
        return None
    x, mean = node.args
    value, channels = mean.meta["val"], x.meta["val"].shape[1]  # type: ignore[union-attr]
    each = value.dim() == x.meta["val"].dim() and value.numel() == value.shape[1] == channels  # type: ignore[union-attr]
    if not each or value.dtype != torch.float32 or not _in_memory(x):  # type: ignore[arg-type]
        return None
    while mean.target in _VIEWS:  # type: ignore[union-attr]
        mean = mean.args[0]  # type: ignore[union-attr]
    return x, mean  # type: ignore[return-value]


def _in_memory(node: Node) -> bool:
    """Whether it is there already: an input, or an operator's result that is not fused with its readers."""
    return node.op == "placeholder" or node.target is _aten.convolution.default


def _read_for(grad: Node) -> set[Node]:
    """What the kernel that computes a gradient reads, and all in between."""
    found: set[Node] = set()
    computed = [grad]
    while computed:
        node = computed.pop()
        if node.op == "call_function" and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            computed += set(node.all_input_nodes) - found
            found.update(node.all_input_nodes)
    return found


def _alike(grad: Node, x: Node, product: Node) -> bool:
    values = [node.meta["val"] for node in (grad, x, product)]
    first = values[0]
    return all(v.dtype == first.dtype and v.shape == first.shape and v.stride() == first.stride() for v in values)


def _rewrite(grad: Node, plain: list[Node], products: list[tuple[Node, Node, Node]], place: dict[Node, int]) -> bool:
    changed = False
    while products:
        first = min([*plain, *(node for node, _, _ in products)], key=place.__getitem__)
        there = [item for item in products if all(place[node] < place[first] for node in (grad, *item[1:]))]
        if there:
            _write(grad, plain, there, first)
            changed = True
        products = [item for item in products if item not in there]
        plain = []
    return changed


def _write(grad: Node, plain: list[Node], products: list[tuple[Node, Node, Node]], first: Node) -> None:
    """One operator in front of ``first``, and its results for all the sums."""
    pairs = list(dict.fromkeys((x, mean) for _, x, mean in products))
    with first.graph.inserting_before(first):
        inputs, means = [x for x, _ in pairs], [call_in_place_of(first, _aten.view.default, m, [-1]) for _, m in pairs]
        # Inductor may prefer another layout for a gradient that it computes, which the loop could not read
        ordered = call_in_place_of(first, memory_order_operator(), grad, list(grad.meta["val"].stride()))
        sums = call_in_place_of(first, centered.operator, ordered, inputs, means)
        rows = [call_in_place_of(first, _aten.select.int, sums, 0, i) for i in range(1 + len(pairs))]
    rows_of = dict.fromkeys(plain, rows[0]) | {node: rows[1 + pairs.index((x, mean))] for node, x, mean in products}
    for node, row in rows_of.items():
        with node.graph.inserting_before(node):
            node.replace_all_uses_with(call_in_place_of(node, _aten.view.default, row, list(node.meta["val"].shape)))
