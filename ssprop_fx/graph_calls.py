"""What compiled graphs hold: the calls of each layer, the graphs to look at, and what the compiler saved by itself."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .convolutions import ConvArgs, conv_backward_flops
from .cost import Call, as_number, sizes_of_a_step
from .dataflow import Capture
from .plan import Use

if TYPE_CHECKING:
    from .records import GraphRecord

_CONVOLUTION = torch.ops.aten.convolution.default


def calls_of(records: Sequence[GraphRecord]) -> dict[str, tuple[Use, ...]]:
    """Layer → its calls in the graphs in use: where a frame was compiled again, in the one that trained last."""
    newest: dict[tuple[str, str], GraphRecord] = {}
    found = {}
    for record in records:
        with _sizes_of_last_run(record):
            found[id(record)] = _uses(record)
    for record in sorted(records, key=lambda r: (r.dispatcher is not None, r.ran)):
        newest.update({(record.frame, layer): record for layer in found[id(record)]})
    trained = {layer for (_, layer), record in newest.items() if record.dispatcher is not None}
    merged: dict[str, tuple[Use, ...]] = {}
    for record in records:
        for layer, uses in found[id(record)].items():
            if newest[record.frame, layer] is record and (record.dispatcher is not None or layer not in trained):
                merged[layer] = (*merged.get(layer, ()), *uses)
    return merged


def _sizes_of_last_run(record: GraphRecord) -> contextlib.AbstractContextManager[None]:
    return sizes_of_a_step(record.dispatcher.symbols() if record.dispatcher is not None else {})


def _uses(record: GraphRecord) -> dict[str, list[Use]]:
    """The calls of one graph's layers: from its backward, where there is one, else as Dynamo saw them.

    What a nested region runs several times is a call of each of the modules that it runs for.
    """
    from .ops import BACKWARD_SETTINGS_AT
    from .passes.lower_backward import backward_nodes

    found: dict[str, list[Use]] = {}
    other_branch: dict[str, list[Use]] = {}

    def add(layer: str, use: Use, times: int) -> None:
        (found if times else other_branch).setdefault(layer, []).extend([use] * record.shared.share(layer, times))

    dispatcher = record.dispatcher
    if dispatcher is not None:
        for name, (node, times) in reversed(backward_nodes(dispatcher.graph_module).items()):
            call = _call_of_backward(node, node.args[4:10], node.args[10])
            if call is not None:
                add(str(node.args[BACKWARD_SETTINGS_AT]), Use(call, dispatcher, name), times)
    dense, in_backward = _dense_calls(record), found.keys() | other_branch.keys()
    for decision in record.decisions:
        c = decision.convolution
        if dispatcher is not None and decision.sparse and c.layer in in_backward:
            continue
        call = _captured_call(c)
        if call is not None and dispatcher is not None and decision.sparse:
            add(c.layer, Use(replace(call, needs=(False, False))), c.times)
        elif call is not None:
            match = next((i for i, other in enumerate(dense) if other[:2] == (call.input, call.weight)), None)
            if match is not None:
                call = replace(call, needs=dense.pop(match)[2])
            add(c.layer, Use(call), c.times)
    return other_branch | found


def _call_of_backward(node: Node, args: Sequence[Any], mask: Any) -> Call | None:
    grad, input, weight = (a.meta.get("val") if isinstance(a, Node) else None for a in node.args[:3])
    if grad is None or input is None or weight is None:
        return None
    return Call.of(input, weight, grad, ConvArgs(*args), (bool(mask[0]), bool(mask[1])))


def _dense_calls(record: GraphRecord) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[bool, bool]]]:
    """(input shape, weight shape, gradients computed) of the backward graph's dense convolutions, in forward order."""
    found: list[Any] = []
    if record.backward is not None:
        for node, _ in _nodes(record.backward, torch.ops.aten.convolution_backward.default):
            stride, padding, dilation, transposed, output_padding, groups, mask = node.args[4:11]
            args = (stride, padding, dilation, transposed, output_padding, groups)
            call = _call_of_backward(node, args, mask)
            if call is not None:
                found.append((call.input, call.weight, call.needs))
    return found[::-1]


def _nodes(graph_module: GraphModule, target: Any) -> Iterator[tuple[Node, int]]:
    """The calls of ``target`` in a graph and those inside it, each with how often one run of the whole makes it."""
    from .passes._graphs import graphs_within

    for graph, times in graphs_within(graph_module).values():
        for node in graph.graph.find_nodes(op="call_function", target=target):
            yield node, times


def _captured_call(convolution: Any) -> Call | None:
    from .passes.find_convolutions import example_value

    values = [example_value(convolution.arguments.get(k)) for k in ("input", "weight")] + [example_value(convolution.node)]
    if not all(isinstance(v, Tensor) for v in values):
        return None
    input, weight, output = ([as_number(s) for s in v.shape] for v in values)
    spec = convolution.spec
    if spec.dim and len(input) == spec.dim + 1:
        input, output = [1, *input], [1, *output]
    args = ConvArgs((), (), (), spec.transposed, (), as_number(convolution.arguments.get("groups", 1)))
    call = Call.of(values[0], values[1], values[2], args)
    return replace(call, input=tuple(input), weight=tuple(weight), output=tuple(output))


def captures_of(records: Sequence[GraphRecord]) -> list[Capture]:
    """All of them; ``current`` are those in which a layer trained last, or the newest of one that has not."""
    captures = [_record_capture(f"graph {i}", record) for i, record in enumerate(records)]
    trained = any(record.backward is not None for record in records)
    newest: dict[tuple[str, str], Capture] = {}
    for made, record in sorted(zip(captures, records, strict=True), key=lambda pair: pair[1].ran):
        if record.backward is not None or not trained:
            newest.update({(record.frame, layer): made for layer in made.layers.values() or ("",)})
    current = {id(made) for made in newest.values()}
    return [replace(made, current=id(made) in current) for made in captures]


def _record_capture(title: str, record: GraphRecord) -> Capture:
    from .naming import module_index, plain_text
    from .ops import SETTINGS_AT, conv

    layers = {d.convolution.node.name: d.convolution.layer for d in record.decisions}
    for node in record.captured.graph.find_nodes(op="call_function", target=conv):
        layers[node.name] = str(node.args[SETTINGS_AT])

    @functools.cache
    def path(key: str, text: str) -> str:
        module = module_index.find(key)
        return module_index.name(module) if module is not None else plain_text(text)

    def module_of(node: Node) -> str:
        stack: Iterator[Any] = reversed((node.meta.get("nn_module_stack") or {}).items())
        return next((path(key, str(entry[0])) for key, entry in stack), "")

    modules = {node.name: module_of(node) for node in record.captured.graph.nodes}  # now, while the model is there
    return Capture(title, record.stages(), layers, modules)


def merged_flops(model: nn.Module, records: Sequence[GraphRecord]) -> int:
    """FLOPs of the forward convolutions that the model asks for and the graphs in use do not run.

    AOTAutograd computes equal calls once (a spiking network's first layer sees the same image at every time step), and
    what nothing uses not at all.
    """
    newest: dict[str, GraphRecord] = {}
    for record in sorted(records, key=lambda r: r.ran):
        if record.dispatcher is not None and record.forward is not None:
            newest[record.frame] = record
    saved = 0
    for record in newest.values():
        runs = max((len(list(record.names_of(d, model))) for d in record.decisions), default=1)
        forward: Any = record.forward
        with _sizes_of_last_run(record):
            asked = _asked_flops(record)
            made = sum(times * _forward_flops(node) for node, times in _nodes(forward, _CONVOLUTION))
        saved += runs * max(0, asked - made)
    return saved


def _asked_flops(record: GraphRecord) -> int:
    """FLOPs of the forward convolutions in a graph as Dynamo handed it over; those that ``transform`` rewrote are ours."""
    from .ops import conv
    from .passes.find_convolutions import example_value

    own = [d.convolution for d in record.decisions if d.convolution.spec.dim]
    calls = [(_captured_call(convolution), convolution.times) for convolution in own]
    for node, times in _nodes(record.captured, conv):
        arguments: Any = node.args
        values = [example_value(a) for a in (*arguments[:2], node)]
        if all(isinstance(value, Tensor) for value in values) and values[1].dim() > 2:
            calls.append((Call.of(values[0], values[1], values[2], ConvArgs(*arguments[3:9])), times))
    return sum(times * call.forward_flops() for call, times in calls if call is not None)


def _forward_flops(node: Node) -> int:
    arguments: Any = node.args
    input, weight = (arguments[i].meta["val"].shape for i in (0, 1))
    positions = [as_number(size) for size in (input if arguments[6] else node.meta["val"].shape)]
    return conv_backward_flops(positions, list(map(as_number, weight)), outputs=1)
