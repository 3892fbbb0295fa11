"""Convolution nodes → ``ssprop.conv`` nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.utils._pytree import tree_map

from ssprop_fx import ops
from ssprop_fx._compat import enter_autocast, exit_autocast, translate_checkpoint
from ssprop_fx.convolutions import ConvArgs, ConvSpec, autocast_passes_over, output_channels
from ssprop_fx.cost import is_number
from ssprop_fx.selection import choices

from .assign_policy import Decision
from .find_convolutions import current_arguments, example_value


class Sparsify(PassBase):
    """Rewrite the convolutions that the policy wants sparse; the others stay as they are.

    Requires example values on the nodes (Dynamo and ``make_fx`` give them) for unbatched inputs and ``padding='same'``.
    Ensures that every rewritten node carries ``meta["ssprop"]`` = {layer, rule, drop_rate, kinds} and the metadata of
    the node that it replaces.

    Args:
        decisions: from :func:`assign_policy`, of the graph that the pass is called on.
        allocation: handle of the live allocation, ``""`` for a factor of one.
    """

    def __init__(self, decisions: Sequence[Decision], allocation: str = "") -> None:
        super().__init__()
        self.decisions, self.allocation = decisions, allocation

    def call(self, graph_module: GraphModule) -> PassResult:
        changed = False
        for decision in self.decisions:
            convolution = decision.convolution
            convolution.node.meta["ssprop"] = {
                "layer": convolution.layer,
                "rule": decision.settings.rule,
                "drop_rate": decision.settings.drop_rate,
                "kinds": sorted(convolution.kinds),
            }
            if decision.sparse:
                self._rewrite(graph_module, decision)
                changed = True
        if changed:
            graph_module.graph.lint()
            graph_module.recompile()
        return PassResult(graph_module, changed)

    def _rewrite(self, graph_module: GraphModule, decision: Decision) -> None:
        convolution, settings = decision.convolution, decision.settings
        node, spec, graph = convolution.node, convolution.spec, graph_module.graph
        arguments = settings.as_arguments(convolution.layer, self.allocation)
        bound = current_arguments(graph_module, node)  # an input may be a convolution that was just replaced
        with graph.inserting_before(node):
            example = None
            if node.op == "call_module":
                bound |= _module_arguments(graph_module, node, bound["input"])
                module: Any = graph_module.get_submodule(str(node.target))
                example = _examples(module, spec)
            input, args, unbatched = _prepare(graph, spec, bound, example)
            value = example_value(node)
            uncast = isinstance(value, torch.Tensor) and autocast_passes_over(node.target, value.device.type)
            if uncast:
                entered = graph.call_function(enter_autocast, (value.device.type, None, False, None))
            new = graph.call_function(ops.conv, (input, bound["weight"], bound["bias"], *args, *arguments))
            if uncast:
                graph.call_function(exit_autocast, (entered,))
            if unbatched:
                new.meta |= {k: v for k, v in node.meta.items() if k not in ("example_value", "val")}
                new = graph.call_function(torch.squeeze, (new, 0))
        new.meta |= node.meta
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def checkpoint_as_convolutions(graph_module: GraphModule) -> None:
    """Have a selective checkpoint, if the graph is the body of one, asked about ``ssprop.conv`` as about a convolution."""
    translate_checkpoint(graph_module, _as_known)


def _as_known(operator: Any, *args: Any) -> tuple[Any, ...]:
    """A call of ``ssprop.conv`` as the one of PyTorch's; others as they are."""
    if operator is ops.conv:
        return torch.ops.aten.convolution.default, *args[: ops.SETTINGS_AT]
    return operator, *args


def fix_choices(graph_module: GraphModule) -> None:
    """Make the number of channels that each ``ssprop.conv`` chooses from a number, where it is a symbol.

    How many to keep is settled once for a graph. The symbol's value now becomes a guard of the graph, and another one compiles
    another graph: kernels of each sample's own, one channel each, are as many as the batch has samples.
    """
    for node in graph_module.graph.find_nodes(op="call_function", target=ops.conv):
        weight, args = example_value(node.args[1]), ConvArgs(*tree_map(example_value, node.args[3 : ops.SETTINGS_AT]))
        if weight is not None and not is_number(choices(output_channels(weight.shape, args), args.groups)):
            for size in weight.shape[:2]:
                int(size)
            node.update_arg(ops.SETTINGS_AT - 1, int(args.groups))


def _module_arguments(graph_module: GraphModule, node: Node, input: Any) -> dict[str, Any]:
    module: Any = graph_module.get_submodule(str(node.target))
    graph = node.graph
    padding = module.padding
    if module.padding_mode != "zeros":
        input = graph.call_function(
            torch.nn.functional.pad, (input, module._reversed_padding_repeated_twice), {"mode": module.padding_mode}
        )
        padding = 0
    return {
        "input": input,
        "weight": graph.get_attr(f"{node.target}.weight"),
        "bias": graph.get_attr(f"{node.target}.bias") if module.bias is not None else None,
        "stride": module.stride,
        "padding": padding,
        "dilation": module.dilation,
        "groups": module.groups,
        **({"output_padding": module.output_padding} if module.transposed else {}),
    }


def _examples(module: Any, spec: ConvSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """A symbolic trace knows no shapes; a module is taken to be called with a batch."""
    return torch.empty(1, module.in_channels, *[1] * spec.dim, device="meta"), module.weight


def _prepare(graph, spec, bound, examples=None) -> tuple[Any, ConvArgs, bool]:
    """``ConvSpec.prepare`` on a graph: its tensor operations become nodes."""
    value, weight = examples or (example_value(bound["input"]), example_value(bound["weight"]))
    geometry = {k: v for k, v in bound.items() if k not in ("input", "weight", "bias")}
    if isinstance(bound.get("padding"), str) and (value is None or weight is None):
        raise ValueError(f"{spec.name} with padding {bound['padding']!r} needs example values on its inputs")
    call = spec.prepare(_Input(bound["input"], spec.dim + 2 if value is None else value.dim()), weight, **geometry)
    return call.input.node, call.args, call.unbatched


class _Input:
    """Stands in for a node's value, which nothing can be computed with any more if ``vmap`` made it: writes nodes."""

    def __init__(self, node: Any, dim: int) -> None:
        self.node, self._dim = node, dim

    def dim(self) -> int:
        return self._dim

    def unsqueeze(self, dim: int) -> _Input:
        return _Input(self.node.graph.call_function(torch.unsqueeze, (self.node, dim)), self._dim + 1)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> _Input:
        input, *rest = args
        return cls(input.node.graph.call_function(func, (input.node, *rest), kwargs), input.dim())
