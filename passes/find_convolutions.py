"""Graph → the list of its convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ssprop_fx.convolutions import (
    GENERAL,
    LINEAR,
    SPEC_OF_FUNCTION,
    SPEC_OF_OPERATOR,
    ConvSpec,
    bind_general,
    conv_kinds,
    spec_of_module,
)
from ssprop_fx.cost import as_number

_LINEAR = (torch.ops.aten.linear.default, LINEAR.function)


@dataclass(frozen=True)
class Convolution:
    """One convolution node.

    Attributes:
        node: a call of a convolution function, of ``aten.convolution``, or of a convolution module.
        spec: its row of the convolution table.
        arguments: the call's arguments by name; for a module call, input only.
        layer: the name users know.
        kinds: what a policy rule's ``kind`` can match.
        times: how often one run of the whole graph makes the call; more than once inside of a nested region.
    """

    node: Node
    spec: ConvSpec
    arguments: dict[str, Any]
    layer: str
    kinds: frozenset[str]
    times: int = 1


def find_convolutions(
    module: GraphModule,
    name_of: Callable[[Node, ConvSpec], tuple[str, bool]] | None = None,
    linear: bool = False,
) -> list[Convolution]:
    """All convolutions of a graph, in its order; those that are ``ssprop.conv`` already are left out.

    Args:
        module: a graph from Dynamo, the symbolic tracer, ``torch.export`` or ``make_fx``.
        name_of: (node, spec) → (layer name, whether the call is functional). Without it, module calls are named by
            their target and others by the node.
        linear: find linear layers, too (calls of ``F.linear`` that a linear module makes).
    """
    name_of = name_of or (lambda node, spec: (str(node.target), False) if node.op == "call_module" else (node.name, True))
    found = []
    for node in module.graph.nodes:
        match = _match(module, node)
        if match is None:
            continue
        spec, arguments, shape, groups = match
        if (spec is LINEAR and not linear) or _complex(arguments.get("weight")):
            continue
        layer, functional = name_of(node, spec)
        if spec is LINEAR and functional:
            continue
        kinds = frozenset({spec.name})
        if shape is not None:
            kinds = conv_kinds(spec, tuple(map(as_number, shape)), as_number(example_value(groups)), functional)
        found.append(Convolution(node, spec, arguments, layer, kinds))
    return found


def current_arguments(module: GraphModule, node: Node) -> dict[str, Any]:
    """The arguments of a convolution node by name, as the graph has them now."""
    match = _match(module, node)
    assert match is not None
    return dict(match[1])


def example_value(node: Any) -> Any:
    """The tensor that a node stood for while it was traced, from whichever front end; None if unknown."""
    if not isinstance(node, Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


def _complex(weight: Any) -> bool:
    value = example_value(weight)
    return isinstance(value, torch.Tensor) and value.is_complex()


def _match(module: GraphModule, node: Node) -> tuple[ConvSpec, dict[str, Any], Any, int] | None:
    if node.op == "call_module":
        target: Any = module.get_submodule(str(node.target))
        spec = spec_of_module(target)
        if spec is None:
            return None
        bound = {"input": node.args[0] if node.args else node.kwargs["input"]}
        weight = target.weight  # one that the forward generates is no tensor while it is traced
        return spec, bound, tuple(weight.shape) if isinstance(weight, torch.Tensor) else None, target.groups
    if node.op != "call_function":
        return None
    if node.target in GENERAL:
        spec, bound = bind_general(node.args, node.kwargs, lambda weight: example_value(weight).dim())
        return spec, bound, example_value(bound["weight"]).shape, bound["groups"]
    spec = SPEC_OF_FUNCTION.get(node.target) or SPEC_OF_OPERATOR.get(node.target)
    if node.target in _LINEAR:
        spec = LINEAR
    if spec is None:
        return None
    bound = spec.bind(node.args, node.kwargs)
    weight = example_value(bound["weight"])
    return spec, bound, None if weight is None else weight.shape, bound.get("groups", 1)
