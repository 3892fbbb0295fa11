"""Captured graphs as what a reader looks at: operations in order, what data they take, and their code.

:meth:`Report.to_networkx` and the page are made from the same operations.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from . import ops
from .cost import as_number

if TYPE_CHECKING:
    import networkx

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Capture:
    """One captured graph in its stages.

    Attributes:
        title: ``model``, the name of a submodule, or ``graph 0``.
        stages: by name; the first is the graph before any pass, the second after them.
        layers: name of a node of the first stage → layer, for the convolutions.
        modules: name of a node of the first stage → name of the module that it is a call of, or that makes the call.
        shapes: name of a node → shape of its output, where the nodes do not hold it.
        current: False for a graph that a training step does not run any more, or that only evaluation runs.
    """

    title: str
    stages: Mapping[str, GraphModule]
    layers: Mapping[str, str]
    modules: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    current: bool = True


@dataclass(frozen=True)
class Operation:
    """One node of a captured graph.

    Attributes:
        name: of the node.
        op: of ``torch.fx``: ``placeholder``, ``call_module``, ``call_function``, ``call_method``, ``get_attr``, ``output``.
        target: what is called: ``Conv2d``, ``add``, ``relu``.
        module: name of the module that it is a call of, or in whose forward the call stands.
        inputs: names of the operations whose results it takes.
        shape: of the output; None if unknown.
        layer: for a convolution that the report has a row for.
        nth: which call of the layer it is, from 0.
        parameter: whether it stands for a parameter or a buffer.
        code: one statement of the graph before the passes.
        rewritten: the statement after them; None where they changed nothing.
        lowered: stage → the statements of its backward pass, for the stages after the rewrite.
    """

    name: str
    op: str
    target: str
    module: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...] | None
    layer: str | None
    nth: int
    parameter: bool
    code: str
    rewritten: str | None = None
    lowered: Mapping[str, str] = field(default_factory=dict)


def operations(capture: Capture, parameters: bool = False) -> list[Operation]:
    """The operations of a captured graph, in its order.

    Args:
        parameters: whether parameters and buffers are among them; what only counts batches goes with them.
    """
    (_, before), *later = capture.stages.items()
    code, after = statements(before), _rewritten(later[0][1]) if later else {}
    lowered = {stage: _lowered(graph) for stage, graph in later[1:] if stage != "forward"}
    seen: dict[str, int] = defaultdict(int)
    found = []
    for node in before.graph.nodes:
        layer = capture.layers.get(node.name)
        nth = 0
        if layer is not None:
            nth, seen[layer] = seen[layer], seen[layer] + 1
        parameter = _is_parameter(node)
        value = node.meta.get("example_value", node.meta.get("val"))
        shape = tuple(as_number(s) for s in value.shape) if isinstance(value, Tensor) else capture.shapes.get(node.name)
        inputs = [i for i in dict.fromkeys(node.all_input_nodes) if parameters or not _is_parameter(i)]
        if not parameters and (parameter or _is_bookkeeping(node, inputs)):
            continue
        calls = after.get(layer, ()) if layer is not None else ()
        found.append(
            Operation(
                node.name,
                node.op,
                _target(before, node, code),
                "" if node.op in ("placeholder", "output") else capture.modules.get(node.name, ""),
                tuple(i.name for i in inputs),
                shape,
                layer,
                nth,
                parameter,
                _plain_statement(node) if node.op == "placeholder" else code.get(node.name, _plain_statement(node)),
                calls[nth] if nth < len(calls) else None,
                {stage: text[layer] for stage, text in lowered.items() if layer in text} if layer is not None else {},
            )
        )
    kept = {o.name for o in found}
    return [_with_inputs(o, kept) for o in found]


def to_networkx(
    captured: Mapping[str, Sequence[Operation]], rows: Mapping[str, Mapping[str, Any]], rest: bool
) -> networkx.DiGraph:
    """See :meth:`Report.to_networkx`; ``rest``: whether the layers that are in no graph become nodes."""
    import networkx

    graph = networkx.DiGraph()
    for title, found in captured.items():
        prefix = f"{title}/" if len(captured) > 1 else ""
        for o in found:
            row = rows.get(o.layer or "", {})
            graph.add_node(
                f"{prefix}{o.name}",
                **(dict(row) | {"op": o.op, "target": o.target, "module": o.module, "shape": o.shape, "layer": o.layer}),
            )
            graph.add_edges_from((f"{prefix}{i}", f"{prefix}{o.name}") for i in o.inputs)
    inside = {o.layer for found in captured.values() for o in found}
    for layer, row in rows.items() if rest else ():
        if layer not in inside:
            own = {"op": "layer", "target": row["kind"], "module": layer.partition("#")[0], "shape": row["output_shape"]}
            graph.add_node(layer, **(dict(row) | own))
    return graph


def shapes_of(graph_module: GraphModule, inputs: Sequence[Any], names: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs of a graph's nodes, from a run on tensors without data.

    Args:
        graph_module: its parameters and buffers are on the device ``meta``.
        inputs, names: arguments by position and by name.

    Returns:
        Node name → shape; as far as the run got.
    """
    found: dict[str, tuple[int, ...]] = {}

    class Shapes(Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                found[n.name] = tuple(result.shape)
            return result

    placeholders = {str(n.target): n.args[0] if n.args else None for n in graph_module.graph.find_nodes(op="placeholder")}
    given = placeholders | dict(zip(placeholders, inputs, strict=False)) | dict(names)
    try:
        with torch.no_grad():
            Shapes(graph_module, garbage_collect_values=True).run(
                *(v.to("meta") if isinstance(v := given[name], Tensor) else v for name in placeholders)
            )
    except Exception as problem:  # the model's own operations run on meta tensors, which may raise anything
        logger.debug("no shapes from here on: %s", problem)
    return found


_STATEMENT = re.compile(r"^\s+(\w+)(?:\s*:[^=]*)? = (.*)$")
_IN_PLACE = re.compile(r"^\s+(\w+ \S{1,3}= [^;]+);\s+(\w+) = \w+")
_CALLED = re.compile(r" = [\w.]*\b(\w+)\(")
_DELETIONS = re.compile(r";\s+(?:\w+ = )+None.*$")


def statements(graph_module: GraphModule) -> dict[str, str]:
    """Node name → its statement in the generated code, names of parameters as in ``named_parameters()``."""
    found = {}
    for line in graph_module.code.splitlines():
        in_place = _IN_PLACE.match(line)
        if in_place is not None:
            found[in_place[2]] = _readable(in_place[1])
            continue
        match = _STATEMENT.match(line)
        if match is not None and match[1] not in found:
            found[match[1]] = f"{match[1]} = {_readable(_DELETIONS.sub('', match[2]))}"
    return found


_PARAMETER = re.compile(r"\b[lL]_self_(?:modules_)?(\w+?)_(?:parameters|buffers)_(\w+?)_\b")
_WRAPPER = re.compile(r"^_*dict_*\.")  # modules that Dynamo found in self.__dict__
_CHILD = re.compile(r"getattr\((self[\w.]*), \"(\w+)\"\)")


def _readable(code: str) -> str:
    code = _PARAMETER.sub(lambda m: f"self.{_WRAPPER.sub('', m[1].replace('_modules_', '.'))}.{m[2]}", code)
    while _CHILD.search(code):  # getattr(self.layer1, "0").conv1 → self.layer1.0.conv1
        code = _CHILD.sub(r"\1.\2", code)
    return code


def _rewritten(graph_module: GraphModule) -> dict[str, list[str]]:
    code = statements(graph_module)
    attributes = {n.name: f"self.{n.target}" for n in graph_module.graph.find_nodes(op="get_attr")}
    found: dict[str, list[str]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target is ops.conv:
            text = code.get(node.name, _plain_statement(node))
            for name in (n.name for n in node.all_input_nodes if n.name in attributes):
                text = re.sub(rf"\b{name}\b", attributes[name], text)
            found[node.args[ops.SETTINGS_AT]].append(text)
    return found


def _lowered(graph_module: GraphModule) -> dict[str, str]:
    code = statements(graph_module)
    found: dict[str, list[str]] = defaultdict(list)
    for node in graph_module.graph.nodes:
        layer = (node.meta.get("ssprop") or {}).get("layer")
        if node.op == "call_function" and node.target is ops.conv_backward:
            layer = node.args[ops.BACKWARD_SETTINGS_AT]
        if layer is not None and node.op != "get_attr":
            found[layer].append(code.get(node.name, _plain_statement(node)))
    return {layer: "\n".join(lines) for layer, lines in found.items()}


def _plain_statement(node: Node) -> str:
    if node.op == "placeholder":
        return f"def forward(self, …, {node.target}, …)"
    if node.op == "output":
        return f"return {node.args[0]}"
    return str(node.format_node())


def _target(graph_module: GraphModule, node: Node, code: Mapping[str, str]) -> str:
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target))).__name__
    if node.op == "placeholder":
        return "input"
    if node.op == "call_function":
        if node.target is ops.conv:
            return "ssprop.conv"
        if isinstance(node.target, torch._ops.OpOverload):
            return node.target.overloadpacket.__name__
        name = getattr(node.target, "__name__", str(node.target))
        if name == "fn":  # torch.nn.functional wraps some of its functions so
            called = _CALLED.search(code.get(node.name, ""))
            name = called[1] if called else name
        return name.strip("_")
    return str(node.target).strip("_") if node.op == "call_method" else node.op


def _is_parameter(node: Node) -> bool:
    if node.op == "get_attr":
        return True
    return node.op == "placeholder" and _PARAMETER.search(str(node.target)) is not None


def _is_bookkeeping(node: Node, inputs: Sequence[Node]) -> bool:
    """Takes and gives nothing but parameters and buffers, such as the count of a batch norm's batches."""
    return node.op not in ("placeholder", "output") and not inputs and not list(_users(node))


def _users(node: Node) -> Iterator[Node]:
    for user in node.users:
        if user.op != "output":
            yield user


def _with_inputs(operation: Operation, kept: set[str]) -> Operation:
    inputs = tuple(name for name in operation.inputs if name in kept)
    return operation if inputs == operation.inputs else Operation(**(vars(operation) | {"inputs": inputs}))
