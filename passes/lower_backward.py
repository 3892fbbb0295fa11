"""``ssprop.conv_backward`` nodes → plain operations, for one phase: aten's, and on the CPU some of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ssprop_fx import ops
from ssprop_fx._compat import fake_mode_of, in_memory_order
from ssprop_fx.backward import sparse_backward
from ssprop_fx.convolutions import ConvArgs, output_channels
from ssprop_fx.cost import Call, as_number
from ssprop_fx.gather import channels_last
from ssprop_fx.selection import Demand, choices

from ._graphs import graphs_within, has_static_shape


def backward_nodes(graph_module: GraphModule) -> dict[str, tuple[Node, int]]:
    """The ``ssprop.conv_backward`` nodes of a graph and of those inside it, in its order, with how often each is run.

    By name; inside a nested region or a branch, after the path of that graph.
    """
    return {
        f"{path}.{node.name}".lstrip("."): (node, times)
        for path, (graph, times) in graphs_within(graph_module).items()
        for node in graph.graph.find_nodes(op="call_function", target=ops.conv_backward, sort=True)
    }


def lowering_demands(graph_module: GraphModule) -> dict[str, Demand]:
    """What each ``ssprop.conv_backward`` asks for, by its name in :func:`backward_nodes`; the demands are named so, too.

    In the order of the forward, as layers announce themselves in eager mode: among equal layers the rounding plan goes by it.
    """
    demands = {}
    for name, (node, times) in reversed(backward_nodes(graph_module).items()):
        grad, input, weight = (_value(a) for a in node.args[:3])
        geometry = tree_map(lambda arg: as_number(_value(arg)) if isinstance(arg, Node) else arg, node.args[4:10])
        _, drop_rate, criterion, round_to, gradients, _ = node.args[ops.BACKWARD_SETTINGS_AT :]
        call = Call.of(input, weight, grad, ConvArgs(*geometry), tuple(node.args[10][:2]))
        demand = call.demand(name, float(drop_rate), round_to, criterion, gradients)
        demands[name] = replace(demand, flops=demand.flops * max(times, 1))
    return demands


class LowerBackward(PassBase):
    """Replace every ``ssprop.conv_backward`` by the sparse (or, at full count, dense) backward in plain operations.

    Requires fake values in ``meta["val"]``, as AOTAutograd leaves them. Ensures that no ``ssprop.conv_backward`` is left,
    that metadata and layer names carry over, and that the graph passes lint.

    Args:
        keep: name in :func:`backward_nodes` → channels to keep.
        decompositions: the table that the code behind the graph expects (Inductor's, or none).
    """

    def __init__(
        self,
        keep: Mapping[str, int],
        decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    ) -> None:
        super().__init__()
        self.keep, self.decompositions = keep, dict(decompositions or {})

    def call(self, graph_module: GraphModule) -> PassResult:
        changed = set()
        traced: dict[str, GraphModule] = {}  # by what layers that are alike have in common: a network repeats its blocks
        for name, (node, _) in backward_nodes(graph_module).items():
            path = name.rpartition(".")[0]
            self._lower(graph_module.get_submodule(path), node, self.keep[name], traced)
            changed.add(path)
        # the outer graphs last: their code refers to the inner ones
        for path in sorted(changed, reverse=True):
            graph = graph_module.get_submodule(path)
            graph.graph.eliminate_dead_code()
            graph.graph.lint()
            graph.recompile()
        return PassResult(graph_module, bool(changed))

    def ensures(self, graph_module: GraphModule) -> None:
        left = backward_nodes(graph_module)
        if left:
            raise AssertionError(f"not lowered: {', '.join(left)}")

    def _lower(self, graph_module: GraphModule, node: Node, keep: int, traced: dict[str, GraphModule]) -> None:
        from torch.fx.experimental.proxy_tensor import make_fx  # brings sympy, which takes a second to import

        # tensors, and whatever of the geometry is a symbolic size
        flat, structure = tree_flatten(list(node.args[:10]))
        places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Node)]
        values = [_value(flat[place]) for place in places]
        weight, mask = _value(node.args[2]), node.args[10]
        layer, _, criterion, _, gradients, _ = node.args[ops.BACKWARD_SETTINGS_AT :]
        args = ConvArgs(*tree_map(_value, node.args[4:10]))
        sparse = keep < choices(output_channels(weight.shape, args), args.groups)
        inductor = bool(self.decompositions) and sparse and weight.dim() > 2

        def backward(*values):
            filled = list(flat)
            for place, value in zip(places, values, strict=True):
                filled[place] = value
            grad, input, weight, output, *geometry = tree_unflatten(filled, structure)
            if inductor and channels_last(grad):
                # Inductor may write it once in its own order, to rank it, and once with channels last, to gather from it;
                # on an accelerator in single precision before it is rounded, for the two to read
                grad = in_memory_order(grad)
            return sparse_backward(
                grad,
                input,
                weight,
                output,
                ConvArgs(*geometry),
                mask,
                keep,
                criterion,
                gradients,
                compiling=True,
                apart=inductor and grad.device.type == "cpu",
            )

        def trace() -> GraphModule:
            with fake_mode_of(values) or torch.no_grad(), torch.no_grad():
                return make_fx(backward, self.decompositions, tracing_mode="real", pre_dispatch=False)(*values)

        if all(isinstance(value, torch.Tensor) and has_static_shape(value) for value in values):
            # a tensor that comes twice, say as its own kernel, has one description: it is traced as one
            tensors = {id(v): (at, v.dtype, v.device, v.shape, v.stride()) for at, v in enumerate(values)}
            given = [tensors[id(_value(leaf))] if isinstance(leaf, Node) else leaf for leaf in flat]
            key = repr((given, structure, mask, keep, criterion, gradients))
            if key not in traced:
                traced[key] = trace()
            lowered = traced[key]
        else:
            lowered = trace()
        self._splice(graph_module, node, lowered, [flat[place] for place in places], layer)

    def _splice(self, graph_module, node, traced, inputs, layer) -> None:
        graph = graph_module.graph
        mapping: dict[Node, Any] = {}
        placeholders = traced.graph.find_nodes(op="placeholder")
        for placeholder, value in zip(placeholders, inputs, strict=True):
            mapping[placeholder] = value
        inherited = {
            k: node.meta[k]
            for k in ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "partitioner_tag", "autograd_backward")
            if k in node.meta
        }
        inherited["ssprop"] = {"layer": layer}
        results: Any = None
        with graph.inserting_before(node):
            for old in traced.graph.nodes:
                if old.op == "placeholder":
                    continue
                if old.op == "output":
                    results = torch.fx.node.map_arg(old.args[0], mapping.__getitem__)
                    continue
                if old.op == "get_attr":
                    name = f"_ssprop_{node.name}_{old.target}"
                    setattr(graph_module, name, getattr(traced, old.target))
                    new = graph.get_attr(name)
                else:
                    new = graph.node_copy(old, mapping.__getitem__)
                new.meta = {**old.meta, **inherited}
                mapping[old] = new
        for user in list(node.users):
            index = user.args[1]
            replacement = results[index]
            if replacement is not None and not self.decompositions:
                # what comes after was traced for the dense gradient's layout; Inductor alone does not hold to it
                replacement = _laid_out(graph, replacement, user)
            if replacement is not None:
                user.replace_all_uses_with(replacement)
            elif user.users:
                user.replace_all_uses_with(None)  # type: ignore[arg-type]
            graph.erase_node(user)
        graph.erase_node(node)


def _laid_out(graph: torch.fx.Graph, grad: Node, like: Node) -> Node:
    """A node with a gradient in the memory format of another one."""
    value = like.meta["val"]
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(value.dim(), torch.contiguous_format)
    form = torch.contiguous_format if value.is_contiguous() else last
    if grad.meta["val"].is_contiguous(memory_format=form):
        return grad
    with graph.inserting_before(like):
        new = graph.call_function(torch.ops.aten.clone.default, (grad,), {"memory_format": form})
    new.meta = {**grad.meta, "val": value}
    return new


def _value(arg: Any) -> Any:
    return arg.meta["val"] if isinstance(arg, Node) else arg
