"""What was rewritten: ``inspect(model)`` gives a :class:`Report`, one row per convolution."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch.fx import Node

from ._compat import is_compiled
from .convolutions import conv_kinds, spec_of_module
from .coverage import MeasuredLayer, Measurement, arguments_of, measure
from .dataflow import Capture, shapes_of
from .errors import SSPropError
from .graph_calls import calls_of, captures_of, merged_flops
from .naming import module_index, plain_modules, unwrap
from .plan import Layer, Use, left_row, report_of
from .policy import Policy
from .report import Report, Row
from .sites import Site
from .survey import layer_kinds, scripted_convolutions
from .tracing import TracedModule, capture
from .transform import (
    COMPLEX,
    SCRIPTED,
    Transformation,
    changed_layers,
    rewritten_modules,
    transformation_of,
    transformed,
    transformed_parts,
)

if TYPE_CHECKING:
    from .records import GraphRecord


class Unreached(SSPropError):
    """No graph of a compiled model has come to the backend: so far all of it trains dense."""


class Unmeasured(SSPropError):
    """A model's step cannot be run: what runs its compiled code is not known."""


def inspect(model: nn.Module, example_inputs: Any = None) -> Report:
    """What ``transform`` or the backend did to a model.

    Args:
        model: a transformed model, or a compiled one after its first step (wrappers such as DDP are looked through).
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments. With them, a dense and
            a sparse training step are run on a copy and the convolution backwards counted: coverage is then measured,
            and shapes and FLOPs are known without a step of your own. Without them, those of an eager model are of the
            calls in its first step, up to the layer's first backward pass.

    Raises:
        SSPropError: the model is neither, or there are example inputs for a model that FSDP has sharded, or of which a lazy
            part has not run yet.
        Unmeasured: an ``SSPropError``; there are example inputs for a model that runs in a compiled function.
        Unreached: an ``SSPropError``; the model is compiled and no graph of it has been captured yet.

    Examples:
        >>> policy = ssprop_fx.Policy(drop_rate=0.75, schedule={"kind": "constant"})
        >>> model = ssprop_fx.transform(torch.nn.Conv2d(3, 8, 3), policy)
        >>> report = inspect(model, torch.randn(2, 3, 8, 8))
        >>> report.coverage
        1.0
        >>> report.rows[0].kept, report.rows[0].total, report.rows[0].output_shape
        (2, 8, (2, 8, 6, 6))
    """
    if not isinstance(model, nn.Module):
        raise SSPropError(
            f"inspect takes a module, got {type(model).__name__}"
            + ("; of a compiled function, inspect the model that it calls" if callable(model) else "")
        )
    record, parts = transformation_of(model), transformed_parts(model)
    if len(parts) > 1:
        raise SSPropError(
            f"{type(model).__name__} holds {len(parts)} parts that were transformed one by one, each under its own record "
            f"({', '.join(parts)}); inspect each of them, or transform the whole"
        )
    user_model = unwrap(model)
    measurement = None
    if example_inputs is not None:
        measurement = measure(model if record is not None else with_its_code(model), example_inputs)
    if record is not None:
        records = _records_of_transformed(record) if is_compiled(model) else []
        measurement = _as_compiled(measurement, user_model, records)
        return _of_transformed(model, record, measurement, records, example_inputs)
    records = _records(user_model)
    if records:
        return _of_compiled(user_model, records, _as_compiled(measurement, user_model, records))
    if (whole := _compiled_whole(user_model)) is not None:
        raise SSPropError(
            f"{type(user_model).__name__} is a part of {type(whole).__name__}, which names its layers: inspect the whole"
        )
    if is_compiled(model):
        raise Unreached(
            'no graph of the compiled model has come to the backend "ssprop": no step was run yet, another backend was given, '
            "or Dynamo gave the model up, and then all of it trains dense (TORCH_LOGS=graph_breaks tells why); to reach every "
            "convolution call ssprop_fx.transform(model, policy) first and compile its result"
        )
    if any(True for _ in rewritten_modules(model)):
        raise SSPropError(
            f"{type(model).__name__} is made of parts of a transformed model, which still train by its policy; "
            "inspect the transformed model itself, of which the report is"
        )
    raise SSPropError(
        f"{type(model).__name__} has not been rewritten; inspect the result of ssprop_fx.transform(model, policy), "
        'or of torch.compile(model, backend="ssprop") after a step; policy.explain(model) shows what a policy would do'
    )


def with_its_code(model: nn.Module) -> nn.Module:
    """What runs a model's compiled code, where the model itself does not: what ``torch.compile(model)`` returned.

    Raises:
        Unmeasured: only a function that calls the model was compiled.
    """
    if is_compiled(model) or not _records(unwrap(model)):
        return model
    module_index.scan()
    compiled = module_index.compiled(unwrap(model))
    if compiled is None:
        raise Unmeasured(
            f"{type(unwrap(model)).__name__} runs in a compiled function, of which no step can be run from here: inspect it "
            "without example inputs after a step, which says what the graphs hold"
        )
    return compiled


def _as_compiled(measurement: Measurement | None, model: nn.Module, records: list[GraphRecord]) -> Measurement | None:
    if measurement is None or not records:
        return measurement
    return replace(measurement, step_flops=measurement.step_flops - merged_flops(model, records))


def foresee(model: nn.Module, policy: Policy, example_inputs: Any = None) -> Report:
    """What ``inspect`` would say of a model once it is transformed; the model and the policy stay as they are.

    Args:
        model, example_inputs: as for :func:`inspect`, the model untouched.

    Raises:
        PolicyError, TransformError: as :func:`ssprop_fx.transform`.
    """
    own = copy.deepcopy(policy)  # to bind a trial's layers to
    report = inspect(transformed(model, own), example_inputs)
    return replace(report, front_end="policy", policy=policy)


# --- transformed models


def _of_transformed(
    model: nn.Module,
    record: Transformation,
    measurement: Measurement | None,
    records: list[GraphRecord],
    example_inputs: Any,
) -> Report:
    unreached = _unreached(measurement) if measurement is not None and is_compiled(model) else {}
    model = unwrap(model)
    (place, part), *_ = transformed_parts(model).items()  # layers are named from there on
    traced = functools.cache(lambda: capture(part, record))
    in_graph = {layer for t in traced() for layer in t.layers}
    compiled = calls_of(records)
    measured = measurement.layers if measurement else {}
    layers: dict[str, Layer] = {}
    gone, new = changed_layers(part, record)
    met: list[tuple[str, MeasuredLayer | Site]] = [*measured.items(), *record.sites.items()]
    imaginary = {name: site for name, site in met if site.complex and name not in gone}
    trained = any(site.ran_backward for site in record.sites.values())
    for name, site in record.sites.items():
        if name in gone or name in unreached or name in imaginary:
            continue
        rung = "graph" if name in in_graph else site.rung
        uses = compiled.get(name) or _site_uses(site, measured.get(name), trained)
        layers[name] = Layer(site.spec.name, site.kinds, rung, site.settings, uses)
    for name, m in measured.items():  # functional calls that only the measured step has met
        if name not in layers and name not in gone and name not in unreached and name not in imaginary:
            uses = compiled.get(name) or tuple(map(Use, m.calls))
            layers[name] = Layer(m.spec.name, m.kinds, "call", m.settings, uses)

    compiled_captures = captures_of(records)

    @functools.cache
    def captures() -> list[Capture]:
        if compiled_captures or example_inputs is None:
            return compiled_captures or [_traced_capture(t, layers, None) for t in traced()]
        full = {t.name: f"{place}.{t.name}".strip(".") for t in traced()}
        arguments = arguments_of(model, list(full.values()), example_inputs)
        return [_traced_capture(t, layers, arguments.get(full[t.name])) for t in traced()]

    left = [left_row(layer, reason) for layer, reason in record.skipped.items()]
    left += [
        left_row(name, COMPLEX, site.spec.name, sorted(site.kinds)) for name, site in imaginary.items() if name not in gone
    ]
    left += [left_row(name, _NEW, *_kinds(module)) for name, module in new.items()]
    inside = set(part.modules())
    beside = {n: m for n, m in model.named_modules() if spec_of_module(m) is not None and m not in inside}
    left += [left_row(name, _BESIDE.format(place), *_kinds(module)) for name, module in beside.items()]
    for owner, count in (measurement.hidden if measurement else {}).items():
        if owner not in new and owner not in beside:
            left.append(left_row(f"{owner}#convolution", f"{count} in a step, {_HIDDEN}", kinds=("functional",)))
    left += [left_row(name, _COMPILED, m.spec.name, sorted(m.kinds)) for name, m in unreached.items()]
    elsewhere = measurement.elsewhere - sum(len(m.calls) for m in unreached.values()) if measurement else 0
    if elsewhere > 0:
        left.append(left_row("elsewhere#convolution", f"{elsewhere} in a step, {_ELSEWHERE}", kinds=("functional",)))
    demands = record.allocation.demands
    policy, quantized, modules = record.policy, bool(records), layer_kinds(part)
    return report_of(model, "transform", policy, layers, left, demands, measurement, quantized, captures, modules)


def _unreached(measurement: Measurement) -> dict[str, MeasuredLayer]:
    """Layers of a compiled model with calls that had a gradient in the dense step, and none in the sparse one."""
    found = {}
    for name, layer in measurement.layers.items():
        if any(any(call.needs or ()) for call in layer.calls) and not measurement.calls.get(name) and not layer.complex:
            found[name] = layer
    return found if measurement.elsewhere else {}


def _site_uses(site: Site, measured: MeasuredLayer | None, trained: bool) -> tuple[Use, ...]:
    """The calls of a layer. Once others have ``trained``, one that has only run without gradients is taken to need none."""
    if measured is not None:
        return tuple(map(Use, measured.calls))
    return tuple(Use(replace(c, needs=(False, False)) if trained and c.needs is None else c) for c in site.first_step)


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

_HIDDEN = (
    "made by code that transform did not recognise as calling a convolution, by a hook registered after it, or by what it "
    "cannot change (scripted by torch.jit); the backend may reach it"
)
_ELSEWHERE = (
    "made outside of its module's forward: again in the backward pass (which use_reentrant=False in checkpoint avoids), in "
    "another thread, or in a method that is no forward"
)
_COMPILED = "in compiled code where transform does not reach it: in a checkpoint of a method, for one"
_BESIDE = "beside the part that was transformed, {!r}, and dense; transform the whole, made of the original part"
_NEW = "put into the model after transform; transform the original again"
_OUTSIDE = "in no captured graph (a graph break, or not run yet); transform first, then compile, reaches it"


def _records(model: nn.Module) -> list[GraphRecord]:
    from .records import records_of

    return [record for _, record in records_of(model)]


def _compiled_whole(part: nn.Module) -> nn.Module | None:
    """The model of which a compiled part is."""
    from .records import compiled_models

    return next((model for model in compiled_models() if any(module is part for module in model.modules())), None)


def _records_of_transformed(transformation: Transformation) -> list[GraphRecord]:
    """The graphs that name the model's allocation."""
    from .ops import conv
    from .passes._graphs import graphs_within
    from .records import state_of

    handle = transformation.allocation.handle
    return [
        record
        for record in state_of(transformation.policy).records
        if any(
            node.args[-1] == handle
            for graph, _ in graphs_within(record.captured).values()
            for node in graph.graph.find_nodes(op="call_function", target=conv)
        )
    ]


def _of_compiled(model: nn.Module, records: list[GraphRecord], measurement: Measurement | None) -> Report:
    compiled = calls_of(records)
    layers: dict[str, Layer] = {}
    for record in records:
        for decision in record.decisions:
            c = decision.convolution
            for layer, settings in record.names_of(decision, model):
                layers.setdefault(layer, Layer(c.spec.name, c.kinds, "graph", settings, compiled.get(c.layer, ())))
    place = {name: i for i, (name, _) in enumerate(plain_modules(model))}
    layers = dict(sorted(layers.items(), key=lambda item: place.get(item[0].partition("#")[0], len(place))))
    left = []
    missed = measurement.missed if measurement else {}
    for name in [name for name in layers if measurement is not None and name in missed and name not in measurement.calls]:
        del layers[name]  # what the graphs hold of it has no backward pass
    for name, module in plain_modules(model):
        spec = spec_of_module(module)
        if spec is not None and name not in layers:
            reason = _OUTSIDE if measurement is None or name in missed else "no backward pass in the measured step"
            left.append(left_row(name, COMPLEX if _complex(module) else reason, *_kinds(module)))
    left += [left_row(name, SCRIPTED) for name in scripted_convolutions(model, plain=True)]
    known = {row.layer for row in left}
    for name, (_, function, of_kinds) in missed.items():
        if name not in layers and name not in known:  # functional ones
            left.append(left_row(name, _OUTSIDE, function, sorted(of_kinds)))
    captures = captures_of(records)
    policy, modules = _policy_of(model), layer_kinds(model, plain=True)
    return report_of(model, "backend", policy, layers, left, {}, measurement, True, lambda: captures, modules)


def _kinds(module: nn.Module) -> tuple[str, list[str]]:
    """Function and kinds of a convolution module."""
    spec, m = spec_of_module(module), cast(Any, module)
    assert spec is not None
    return spec.name, sorted(conv_kinds(spec, tuple(m.weight.shape), m.groups))


def _complex(module: nn.Module) -> bool:
    return cast(Any, module).weight.is_complex()


def _policy_of(model: nn.Module) -> Policy:
    from .records import records_of

    return records_of(model)[-1][0]


__all__ = ["Report", "Row", "inspect"]
