"""The symbolic tracer: graphs of the parts of a model that trace faithfully, to look at and to run the passes on.

Rewriting in eager mode happens at the call sites (:mod:`ssprop_fx.sites`): running a traced graph in place of a model's own
forward would buy no time and would freeze what the trace froze. The graphs show what is rewritten and where; a convolution
that appears in one is on the rung ``graph``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Tracer
from torch.nn.parameter import is_lazy

from .convolutions import spec_of_module
from .naming import plain_name
from .passes import Convolution, Decision, Sparsify, find_convolutions, verify
from .reach import forward_names
from .sharing import shared_copy

if TYPE_CHECKING:
    from .transform import Transformation

logger = logging.getLogger(__name__)

# What a forward may mention only if its trace would not compute the same: torch.fx burns in or drops all of these.
_UNFAITHFUL = frozenset(
    (
        "training", "no_grad", "enable_grad", "set_grad_enabled", "inference_mode", "is_grad_enabled", "requires_grad_",
        "autocast", "is_scripting", "is_tracing", "isinstance", "apply", "checkpoint",
    )
)  # fmt: skip


@dataclass(frozen=True)
class TracedModule:
    """A submodule that traced faithfully.

    Attributes:
        name: the submodule's name, empty for the whole model.
        traced: its graph, convolutions still module calls.
        rewritten: the graph after the passes.
        layers: names of the convolutions in it.
    """

    name: str
    traced: GraphModule
    rewritten: GraphModule
    layers: frozenset[str]

    def graphs(self) -> dict[str, GraphModule]:
        """The graphs by name and stage."""
        title = self.name or "model"
        return {f"{title}/traced": self.traced, f"{title}/rewritten": self.rewritten}


class FaithfulTracer(Tracer):
    """Symbolic tracer that refuses what it would get wrong.

    Modules of ``torch.nn``, convolutions, and modules with hooks or parametrizations stay single nodes, since only calling
    them runs their hooks.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if spec_of_module(m) is not None or _has_hooks(m):
            return True
        if super().is_leaf_module(m, module_qualified_name):
            return True
        return not faithful(m)


def faithful(module: nn.Module) -> bool:
    """Whether nothing in the module's own forward makes a symbolic trace differ from running it."""
    return not (forward_names(module) & _UNFAITHFUL) and "forward" not in vars(module)


def capture(model: nn.Module, record: Transformation) -> list[TracedModule]:
    """Trace the largest submodules that trace faithfully, on a copy whose tensors hold no data.

    Returns:
        One entry per captured submodule that holds a convolution; none overlap.
    """
    blank = shared_copy(model, _blank)
    for module in blank.modules():
        for key in ("_conv_forward", "forward"):
            vars(module).pop(key, None)
    found: list[TracedModule] = []
    _capture(blank, "", record, found)
    return found


def _capture(module: nn.Module, name: str, record: Transformation, found: list[TracedModule]) -> None:
    prefix = f"{name}." if name else ""
    inside = {layer for layer in record.sites if layer.startswith(prefix) and layer != name and "#" not in layer}
    if not inside:
        return
    traced = _trace(module, name)
    if traced is not None:
        held = {str(n.target) for n in traced.graph.nodes if n.op == "call_module"}
        leaves = {f"{prefix}{t}" for t in held}
        if leaves & inside:
            found.append(_rewritten(name, traced, record, prefix))
        for target in sorted(held):
            child = traced.get_submodule(target)
            if spec_of_module(child) is None:
                for sub, grandchild in child.named_children():
                    _capture(grandchild, f"{prefix}{target}.{sub}", record, found)
        return
    for child_name, child in module.named_children():
        _capture(child, f"{prefix}{child_name}", record, found)


def _trace(module: nn.Module, name: str) -> GraphModule | None:
    if not faithful(module) or spec_of_module(module) is not None or isinstance(module, torch.jit.ScriptModule):
        return None
    try:
        graph: Graph = FaithfulTracer().trace(module)
        return GraphModule(module, graph)
    except Exception as problem:  # tracing runs the model's own code on proxies, which may raise anything
        logger.debug("%s does not trace: %s", name or "the model", problem)
        return None


def _rewritten(name: str, traced: GraphModule, record: Transformation, prefix: str) -> TracedModule:
    copy = GraphModule(traced, _copy_graph(traced.graph))
    convolutions = find_convolutions(copy, lambda node, spec: (plain_name(f"{prefix}{node.target}"), node.op != "call_module"))
    decisions = [
        Decision(c, record.sites[c.layer].settings)
        for c in convolutions
        if c.layer in record.sites and c.node.op == "call_module" and _plain(copy.get_submodule(str(c.node.target)), c)
    ]
    Sparsify(decisions, record.allocation.handle)(copy)
    verify(copy, decisions)
    return TracedModule(name, traced, copy, frozenset(d.convolution.layer for d in decisions))


def _plain(module: nn.Module, convolution: Convolution) -> bool:
    """Whether calling the module is nothing but the convolution, so that a node can stand for it."""
    generated = module._parameters.get("weight") is None  # by the model's forward, for one
    spec, cls = convolution.spec, type(module)
    plain = spec.is_plain(cls) and (spec.transposed or spec.is_plain(cls, conv_forward=True))
    return plain and not generated and not _has_hooks(module)


def _copy_graph(graph: Graph) -> Graph:
    new = Graph()
    new.output(new.graph_copy(graph, {}))
    return new


def _blank(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor like this one, which a trace may write to: without data, where one of its layout can be."""
    if is_lazy(tensor):
        return tensor
    dense = tensor.layout == torch.strided and not tensor.is_nested
    empty = torch.empty_like(tensor, device="meta") if dense else tensor.detach().clone()
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or getattr(module, "_backward_pre_hooks", None)
        or hasattr(module, "parametrizations")
    )
