"""What was rewritten: ``inspect(model)`` gives a :class:`Report`, one row per convolution."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ._compat import is_compiled
from .convolutions import ConvArgs, conv_kinds, spec_of_module
from .cost import Call, as_number, total_bytes, total_flops
from .coverage import MeasuredLayer, Measurement, arguments_of, measure
from .dataflow import Capture, shapes_of
from .errors import SSPropError
from .masking import is_masked
from .plan import Layer, LivePlan, Use
from .policy import Policy
from .report import Report, Row
from .sites import Site
from .tracing import TracedModule, capture
from .transform import SCRIPTED, Transformation, scripted_convolutions, transform, transformation_of

if TYPE_CHECKING:
    from .backend import GraphRecord


def inspect(model: nn.Module, example_inputs: Any = None) -> Report:
    """What ``transform`` or the backend did to a model.

    Args:
        model: a transformed model, or a compiled one after its first step (wrappers such as DDP are looked through).
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments. With them, a dense and
            a sparse training step are run on a copy and the convolution backwards counted: coverage is then measured,
            and shapes and FLOPs are known without a step of your own.

    Raises:
        SSPropError: the model is neither, or it is compiled and no graph has been captured yet.

    Examples:
        >>> policy = ssprop_fx.Policy(drop_rate=0.75, schedule={"kind": "constant"})
        >>> model = ssprop_fx.transform(torch.nn.Conv2d(3, 8, 3), policy)
        >>> report = inspect(model, torch.randn(2, 3, 8, 8))
        >>> report.coverage
        1.0
        >>> report.rows[0].kept, report.rows[0].total, report.rows[0].output_shape
        (2, 8, (2, 8, 6, 6))
    """
    from .naming import unwrap

    record = transformation_of(model)
    measurement = None
    if example_inputs is not None:
        measurement = measure(model, example_inputs)
    user_model = unwrap(model)
    if record is not None:
        records = _records_of_transformed(record) if is_compiled(model) else []
        return _of_transformed(user_model, record, measurement, records, example_inputs)
    records = _records(user_model)
    if records:
        return _of_compiled(user_model, records, measurement)
    if is_compiled(model):
        raise SSPropError(
            'the model is compiled but nothing has been captured for the backend "ssprop" yet; '
            'run a training step first (and check that backend="ssprop" was given)'
        )
    raise SSPropError(
        f"{type(model).__name__} has not been rewritten; inspect the result of ssprop_fx.transform(model, policy), "
        'or of torch.compile(model, backend="ssprop") after a step; policy.explain(model) shows what a policy would do'
    )


def foresee(model: nn.Module, policy: Policy, example_inputs: Any = None) -> Report:
    """What ``inspect`` would say of a model once it is transformed; the model and the policy stay as they are.

    Args:
        model, example_inputs: as for :func:`inspect`, the model untouched.

    Raises:
        PolicyError, TransformError: as :func:`ssprop_fx.transform`.
    """
    own = Policy.from_dict(policy.to_dict())  # to bind a trial's layers to
    own.load_state_dict(policy.state_dict())
    report = inspect(transform(model, own), example_inputs)
    return replace(report, front_end="policy", policy=policy)


def _report(
    model: nn.Module,
    front_end: str,
    policy: Policy,
    layers: Mapping[str, Layer],
    left: Sequence[Row],
    demands: Mapping[str, Any],
    measurement: Measurement | None,
    quantized: bool,
    captures: Callable[[], list[Capture]],
) -> Report:
    calls = {name: tuple(use.call for use in layer.uses) for name, layer in layers.items() if layer.uses}
    report = Report(
        type(model).__name__,
        front_end,
        policy,
        policy.steps,
        policy.factor,
        (*(_row(name, layer, measurement) for name, layer in layers.items()), *left),
        measurement,
        calls,
        quantized,
        LivePlan(policy, layers, demands),
        captures,
    )
    return report.at(policy.steps)


def _row(name: str, layer: Layer, measurement: Measurement | None) -> Row:
    settings, first = layer.settings, layer.uses[0].call if layer.uses else None
    calls = tuple(use.call for use in layer.uses)
    reason = "drop rate 0" if settings.drop_rate == 0 else ""
    if not reason and calls and not any(any(c.needs or (True,)) for c in calls):
        reason = "no gradient is computed"
    if not reason and measurement is not None and name in measurement.missed:
        reason = f"{measurement.missed[name][0]} of its calls in no captured graph; transform first, then compile, reaches them"
    if not reason and is_masked(settings.ranking):
        reason = "masked, for analysis: saves nothing"
    return Row(
        layer=name,
        kind=layer.kind,
        kinds=tuple(sorted(layer.kinds)),
        rung=layer.rung,
        rule=settings.rule,
        drop_rate=settings.drop_rate,
        criterion=settings.ranking,
        round_to=settings.round_to,
        gradients=settings.gradients,
        kept=None,
        total=first.channels if first else None,
        input_shape=first.input if first else None,
        weight_shape=first.weight if first else None,
        output_shape=first.output if first else None,
        calls=max(len(calls), 1) if measurement is None else max(len(calls), measurement.calls.get(name, 1)),
        flops_dense=total_flops(calls) if calls else None,
        flops_now=None,
        grad_bytes_dense=total_bytes(calls) if calls else None,
        grad_bytes_now=None,
        reason=reason,
    )


def _left_row(layer: str, reason: str, kind: str = "?", kinds: Sequence[str] = ()) -> Row:
    return Row(
        layer=layer, kind=kind, kinds=tuple(kinds), rung="-", rule="-", drop_rate=0.0, criterion="-", round_to="-",
        gradients="-", kept=None, total=None, input_shape=None, weight_shape=None, output_shape=None, calls=1,
        flops_dense=None, flops_now=None, grad_bytes_dense=None, grad_bytes_now=None, reason=reason,
    )  # fmt: skip


# --- transformed models


def _of_transformed(
    model: nn.Module,
    record: Transformation,
    measurement: Measurement | None,
    records: list[GraphRecord],
    example_inputs: Any,
) -> Report:
    traced = functools.cache(lambda: capture(model, record))
    in_graph = {layer for t in traced() for layer in t.layers}
    compiled = _compiled_uses(records)
    measured = measurement.layers if measurement else {}
    layers: dict[str, Layer] = {}
    for name, site in record.sites.items():
        rung = "graph" if name in in_graph else site.rung
        uses = compiled.get(name) or _site_uses(site, measured.get(name))
        layers[name] = Layer(site.spec.name, site.kinds, rung, site.settings, uses)
    for name, m in measured.items():  # functional calls that only the measured step has met
        if name not in layers:
            uses = compiled.get(name) or tuple(map(Use, m.calls))
            layers[name] = Layer(m.spec.name, m.kinds, "call", m.settings, uses)

    compiled_captures = _record_captures(records)

    @functools.cache
    def captures() -> list[Capture]:
        if compiled_captures or example_inputs is None:
            return compiled_captures or [_traced_capture(t, layers, None) for t in traced()]
        arguments = arguments_of(model, [t.name for t in traced()], example_inputs)
        return [_traced_capture(t, layers, arguments.get(t.name)) for t in traced()]

    left = [_left_row(layer, reason) for layer, reason in record.skipped.items()]
    for owner, count in (measurement.hidden if measurement else {}).items():
        left.append(_left_row(f"{owner}#convolution", f"{count} in a step, {_HIDDEN}", kinds=("functional",)))
    demands = record.allocation.demands
    return _report(model, "transform", record.policy, layers, left, demands, measurement, bool(records), captures)


def _site_uses(site: Site, measured: MeasuredLayer | None) -> tuple[Use, ...]:
    if measured is not None:
        return tuple(map(Use, measured.calls))
    return (Use(site.call),) if site.call is not None else ()


def _traced_capture(traced: TracedModule, layers: Mapping[str, Layer], arguments: tuple[Any, Any] | None) -> Capture:
    prefix = f"{traced.name}." if traced.name else ""
    graphs = {name.rpartition("/")[2]: graph for name, graph in traced.graphs().items()}
    before = traced.traced
    named = {n.name: f"{prefix}{n.target}" for n in before.graph.find_nodes(op="call_module")}
    shapes = shapes_of(before, *arguments) if arguments else {}
    seen: dict[str, int] = {}
    of_node = {}
    for node, layer in named.items():
        if layer in layers:
            of_node[node], uses = layer, layers[layer].uses
            nth = seen[layer] = seen.get(layer, -1) + 1
            if nth < len(uses):
                shapes.setdefault(node, uses[nth].call.output)
    title = next(iter(traced.graphs())).rpartition("/")[0]

    modules = {n.name: named.get(n.name) or f"{prefix}{_innermost(n)}".rstrip(".") for n in before.graph.nodes}
    return Capture(title, graphs, of_node, modules, shapes)


def _innermost(node: Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


# --- compiled models

_HIDDEN = "in code that transform cannot change (scripted by torch.jit?); the backend may reach it"
_OUTSIDE = "in no captured graph (a graph break, or not run yet); transform first, then compile, reaches it"


def _records(model: nn.Module) -> list[GraphRecord]:
    from .backend import records_of

    return [record for _, record in records_of(model)]


def _records_of_transformed(transformation: Transformation) -> list[GraphRecord]:
    """The graphs that name the model's allocation."""
    from .backend import state_of
    from .ops import conv

    handle = transformation.allocation.handle
    return [
        record
        for record in state_of(transformation.policy).records
        if any(n.args[-1] == handle for n in record.captured.graph.find_nodes(op="call_function", target=conv))
    ]


def _of_compiled(model: nn.Module, records: list[GraphRecord], measurement: Measurement | None) -> Report:
    compiled = _compiled_uses(records)
    layers: dict[str, Layer] = {}
    for record in records:
        for decision in record.decisions:
            c = decision.convolution
            for layer, settings in record.names_of(decision, model):
                layers.setdefault(layer, Layer(c.spec.name, c.kinds, "graph", settings, compiled.get(c.layer, ())))
    left = []
    missed = measurement.missed if measurement else {}
    for name, module in model.named_modules():
        spec = spec_of_module(module)
        if spec is not None and name not in layers:
            m: Any = module
            kinds = sorted(conv_kinds(spec, tuple(m.weight.shape), m.groups))
            reason = _OUTSIDE if measurement is None or name in missed else "no backward pass in the measured step"
            left.append(_left_row(name, reason, spec.name, kinds))
    left += [_left_row(name, SCRIPTED) for name in scripted_convolutions(model)]
    known = {row.layer for row in left}
    for name, (_, function, of_kinds) in missed.items():
        if name not in layers and name not in known:  # functional ones
            left.append(_left_row(name, _OUTSIDE, function, sorted(of_kinds)))
    captures = _record_captures(records)
    return _report(model, "backend", _policy_of(model), layers, left, {}, measurement, True, lambda: captures)


def _policy_of(model: nn.Module) -> Policy:
    from .backend import records_of

    return records_of(model)[-1][0]


def _compiled_uses(records: Sequence[GraphRecord]) -> dict[str, tuple[Use, ...]]:
    """Layer → its calls in the graphs in use: where a frame was compiled again, the last that has a backward pass."""
    newest: dict[tuple[str, str], GraphRecord] = {}
    found = {id(record): _uses(record) for record in records}
    for record in sorted(records, key=lambda r: r.dispatcher is not None):
        newest.update({(record.frame, layer): record for layer in found[id(record)]})
    trained = {layer for (_, layer), record in newest.items() if record.dispatcher is not None}
    merged: dict[str, tuple[Use, ...]] = {}
    for record in records:
        for layer, uses in found[id(record)].items():
            if newest[record.frame, layer] is record and (record.dispatcher is not None or layer not in trained):
                merged[layer] = (*merged.get(layer, ()), *uses)
    return merged


def _uses(record: GraphRecord) -> dict[str, list[Use]]:
    """The calls of one graph's layers: from its backward, where there is one, else as Dynamo saw them."""
    from .ops import BACKWARD_SETTINGS_AT

    found: dict[str, list[Use]] = {}
    dispatcher = record.dispatcher
    if dispatcher is not None:
        for node in reversed(dispatcher.settings):
            call = _backward_call(node, node.args[4:10], node.args[10])
            if call is not None:
                found.setdefault(str(node.args[BACKWARD_SETTINGS_AT]), []).append(Use(call, dispatcher, node.name))
    dense, in_backward = _dense_calls(record), set(found)
    for decision in record.decisions:
        c = decision.convolution
        if dispatcher is not None and decision.sparse and c.layer in in_backward:
            continue
        call = _captured_call(c)
        if call is not None and dispatcher is not None and decision.sparse:
            found.setdefault(c.layer, []).append(Use(replace(call, needs=(False, False))))
        elif call is not None:
            match = next((i for i, other in enumerate(dense) if other[:2] == (call.input, call.weight)), None)
            if match is not None:
                call = replace(call, needs=dense.pop(match)[2])
            found.setdefault(c.layer, []).append(Use(call))
    return found


def _backward_call(node: Node, args: Sequence[Any], mask: Any) -> Call | None:
    grad, input, weight = (a.meta.get("val") if isinstance(a, Node) else None for a in node.args[:3])
    if grad is None or input is None or weight is None:
        return None
    return Call.of(input, weight, grad, ConvArgs(*args), (bool(mask[0]), bool(mask[1])))


def _dense_calls(record: GraphRecord) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[bool, bool]]]:
    """(input shape, weight shape, gradients computed) of the backward graph's dense convolutions, in forward order."""
    found: list[Any] = []
    if record.backward is not None:
        target = torch.ops.aten.convolution_backward.default
        for node in record.backward.graph.find_nodes(op="call_function", target=target):
            stride, padding, dilation, transposed, output_padding, groups, mask = node.args[4:11]
            args = (stride, padding, dilation, transposed, output_padding, groups)
            call = _backward_call(node, args, mask)
            if call is not None:
                found.append((call.input, call.weight, call.needs))
    return found[::-1]


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


def _record_captures(records: Sequence[GraphRecord]) -> list[Capture]:
    """All of them; ``current`` are those that hold the newest graph of a layer with a backward pass, or of any other."""
    captures = [_record_capture(f"graph {i}", record) for i, record in enumerate(records)]
    trained = any(record.backward is not None for record in records)
    newest: dict[tuple[str, str], Capture] = {}
    for made, record in zip(captures, records, strict=True):
        if record.backward is not None or not trained:
            newest.update({(record.frame, layer): made for layer in made.layers.values() or ("",)})
    current = {id(made) for made in newest.values()}
    return [replace(made, current=id(made) in current) for made in captures]


def _record_capture(title: str, record: GraphRecord) -> Capture:
    from .backend import _index as index
    from .naming import plain_text
    from .ops import SETTINGS_AT, conv

    layers = {d.convolution.node.name: d.convolution.layer for d in record.decisions}
    for node in record.captured.graph.find_nodes(op="call_function", target=conv):
        layers[node.name] = str(node.args[SETTINGS_AT])

    @functools.cache
    def path(key: str, text: str) -> str:
        module = index.find(key)
        return index.name(module) if module is not None else plain_text(text)

    def module_of(node: Node) -> str:
        stack: Iterator[Any] = reversed((node.meta.get("nn_module_stack") or {}).items())
        return next((path(key, str(entry[0])) for key, entry in stack), "")

    modules = {node.name: module_of(node) for node in record.captured.graph.nodes}  # now, while the model is there
    return Capture(title, record.stages(), layers, modules)


__all__ = ["Report", "Row", "inspect"]
