"""What was rewritten: ``inspect(model)`` gives a :class:`Report`, one row per convolution."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ._compat import is_compiled
from .convolutions import conv_backward_flops, conv_kinds, output_channels, spec_of_module
from .coverage import Measurement, measure
from .errors import SSPropError
from .policy import Policy, Settings
from .selection import choices
from .sites import Site
from .tracing import TracedModule, capture
from .transform import Transformation, transformation_of


@dataclass(frozen=True)
class Row:
    """One convolution of a model.

    Attributes:
        layer: name as in ``named_modules()``; ``owner#conv2d.0`` for a functional call.
        kind: the convolution function.
        kinds: everything a policy rule's ``kind`` can match.
        rung: ``graph``, ``module`` or ``call`` (how it was rewritten), or ``-`` where it was not.
        rule: the rule of the policy that decided.
        drop_rate: the rule's drop rate; times the schedule's factor it is the rate in force.
        kept, total: channels that the next backward pass uses, of how many; whole groups for a depthwise convolution.
            None before shapes are known.
        input_shape, weight_shape, output_shape: of the first call, (N, C, *spatial), as the function takes the weight,
            (N, K, *spatial); None before the first step.
        calls: calls in a step, where a captured graph or a measurement tells; else 1.
        flops_dense, flops_now: of the backward pass (input and weight gradient), a multiply-add counted as two.
        reason: why it is dense, where it is; empty for a rewritten one.
    """

    layer: str
    kind: str
    kinds: tuple[str, ...]
    rung: str
    rule: str
    drop_rate: float
    kept: int | None
    total: int | None
    input_shape: tuple[int, ...] | None
    weight_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    calls: int
    flops_dense: int | None
    flops_now: int | None
    reason: str

    @property
    def rewritten(self) -> bool:
        """Whether its backward pass follows the policy (which may say dense at this step)."""
        return self.rung != "-"


@dataclass(frozen=True)
class Report:
    """What was done to a model, layer by layer. ``print`` it.

    Attributes:
        model: class name of the model.
        front_end: ``transform`` or ``backend``.
        policy: the policy in force.
        rows: one per convolution, in the model's order.
        measurement: counted convolution backwards of one step, if example inputs were given.
    """

    model: str
    front_end: str
    policy: Policy
    rows: tuple[Row, ...]
    measurement: Measurement | None = None
    _graphs: Callable[[], dict[str, GraphModule]] = field(default=dict, repr=False, compare=False)

    @property
    def coverage(self) -> float:
        """Share of the convolutions that are rewritten; of the counted backward calls where they were measured."""
        if self.measurement is not None:
            return self.measurement.coverage
        return sum(r.rewritten for r in self.rows) / len(self.rows) if self.rows else 1.0

    @cached_property
    def graphs(self) -> dict[str, GraphModule]:
        """The captured graphs by name and stage, ``layer1/traced``, ``graph 0/captured``, ``…/rewritten``, ``…/phase …``."""
        return self._graphs()

    @property
    def flops_dense(self) -> int:
        """FLOPs of all dense convolution backward passes of a step, as far as shapes are known."""
        return sum(r.flops_dense or 0 for r in self.rows)

    @property
    def flops_now(self) -> int:
        """The same at the kept counts in force."""
        return sum(r.flops_now or 0 for r in self.rows)

    def __getitem__(self, layer: str) -> Row:
        for row in self.rows:
            if row.layer == layer:
                return row
        raise KeyError(layer)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        return {
            "model": self.model,
            "front_end": self.front_end,
            "policy": self.policy.to_dict(),
            "step": self.policy.steps,
            "factor": self.policy.factor,
            "coverage": self.coverage,
            "flops_dense": self.flops_dense,
            "flops_now": self.flops_now,
            "rows": [asdict(row) for row in self.rows],
            "measurement": self.measurement.to_dict() if self.measurement else None,
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        header = ("layer", "kind", "rung", "rate", "kept", "output", "backward MFLOP", "now", "rule", "reason")
        table = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([self.summary(), "", *lines])

    def summary(self) -> str:
        """Two or three lines: coverage, step, FLOPs."""
        rewritten = sum(r.rewritten for r in self.rows)
        lines = [
            f"{self.model} through {self.front_end}: {rewritten} of {len(self.rows)} convolutions rewritten; "
            f"step {self.policy.steps}, factor {self.policy.factor:g}"
        ]
        if self.measurement is not None:
            lines.append(str(self.measurement))
        if self.flops_dense:
            saved = 1 - self.flops_now / self.flops_dense
            lines.append(
                f"backward convolution FLOPs of a step: {self.flops_now:.4g} of {self.flops_dense:.4g}, "
                f"{saved:.1%} saved at this step"
            )
        else:
            lines.append("FLOPs: unknown before the first training step")
        return "\n".join(lines)


def inspect(model: nn.Module, example_inputs: Any = None) -> Report:
    """What ``transform`` or the backend did to a model.

    Args:
        model: a transformed model, or a compiled one after its first step (wrappers such as DDP are looked through).
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments. With them, a dense and
            a sparse training step are run on a copy and the convolution backwards counted: coverage is then measured.

    Raises:
        SSPropError: the model is neither, or it is compiled and no graph has been captured yet.
    """
    record = transformation_of(model)
    measurement = None
    if example_inputs is not None:
        measurement = measure(model, example_inputs)
    if record is not None:
        return _of_transformed(model, record, measurement)
    from .backend import records_of
    from .naming import unwrap

    user_model = unwrap(model)
    records = records_of(user_model)
    if not records:
        if is_compiled(model):
            raise SSPropError(
                'the model is compiled but nothing has been captured for the backend "ssprop" yet; '
                'run a training step first (and check that backend="ssprop" was given)'
            )
        raise SSPropError(
            f"{type(model).__name__} has not been rewritten; inspect the result of ssprop_fx.transform(model, policy), "
            'or of torch.compile(model, backend="ssprop") after a step; policy.explain(model) shows what a policy would do'
        )
    return _of_compiled(user_model, records, measurement)


def _of_transformed(model: nn.Module, record: Transformation, measurement: Measurement | None) -> Report:
    traced = _Lazy(lambda: capture(model, record))
    in_graph = {layer for t in traced() for layer in t.layers}
    rows = [_site_row(site, "graph" if site.layer in in_graph else site.rung, measurement) for site in record.sites.values()]
    rows += [_skipped_row(layer, reason) for layer, reason in record.skipped.items()]
    return Report(
        _user_class(model),
        "transform",
        record.policy,
        tuple(rows),
        measurement,
        lambda: {name: graph for t in traced() for name, graph in t.graphs().items()},
    )


class _Lazy:
    def __init__(self, make: Callable[[], list[TracedModule]]) -> None:
        self._make = make
        self._value: list[TracedModule] | None = None

    def __call__(self) -> list[TracedModule]:
        if self._value is None:
            self._value = self._make()
        return self._value


def _site_row(site: Site, rung: str, measurement: Measurement | None) -> Row:
    calls = measurement.calls.get(site.layer, 1) if measurement else 1
    settings = site.settings
    if site.shapes is None or site.args is None:
        return _row(site.layer, site.spec.name, site.kinds, rung, settings, calls=calls)
    input_shape, weight_shape, output_shape = site.shapes
    total = choices(output_channels(weight_shape, site.args), site.args.groups)
    kept = site.allocation.keep(site.layer, total, settings.drop_rate, site.allocation.policy.factor, site.round_to)
    positions = input_shape if site.args.transposed else output_shape
    dense = calls * conv_backward_flops(positions, weight_shape, site.args.groups, site.args.transposed)
    return _row(
        site.layer,
        site.spec.name,
        site.kinds,
        rung,
        settings,
        kept=kept,
        total=total,
        shapes=(input_shape, weight_shape, output_shape),
        calls=calls,
        dense=dense,
    )


def _row(
    layer: str,
    kind: str,
    kinds: frozenset[str],
    rung: str,
    settings: Settings,
    kept: int | None = None,
    total: int | None = None,
    shapes: tuple[Sequence[int], Sequence[int], Sequence[int]] | None = None,
    calls: int = 1,
    dense: int | None = None,
    now: int | None = None,
    reason: str = "",
) -> Row:
    if dense is not None and now is None and kept is not None and total:
        now = _flops_now(dense, kept, total, settings.gradients)
    if not reason and settings.drop_rate == 0:
        reason = "drop rate 0"
    input_shape, weight_shape, output_shape = (
        (tuple(int(size) for size in shape) for shape in shapes) if shapes else (None, None, None)
    )
    return Row(
        layer, kind, tuple(sorted(kinds)), rung, settings.rule, settings.drop_rate, kept, total,
        input_shape, weight_shape, output_shape, calls, dense, now, reason,
    )  # fmt: skip


def _flops_now(dense: int, kept: int, total: int, gradients: str) -> int:
    half = dense // 2
    return dense * kept // total if gradients == "all" else half + half * kept // total


def _skipped_row(layer: str, reason: str, kind: str = "?", kinds: Sequence[str] = ()) -> Row:
    return Row(layer, kind, tuple(kinds), "-", "-", 0.0, None, None, None, None, None, 1, None, None, reason)


def _of_compiled(model: nn.Module, records: list, measurement: Measurement | None) -> Report:
    rows: dict[str, Row] = {}
    newest = {(record.frame, layer): record for _, record in records for layer in record.layers()}
    for _, record in records:
        for row in _graph_rows(record):
            if newest[record.frame, row.layer] is not record:
                continue  # compiled again since, for other shapes
            known = rows.get(row.layer)
            rows[row.layer] = row if known is None else _merged(known, row)
    for name, module in model.named_modules():
        spec = spec_of_module(module)
        if spec is not None and name not in rows:
            m: Any = module
            kinds = conv_kinds(spec, tuple(m.weight.shape), m.groups)
            reason = "in no captured graph (a graph break, or not run yet); transform first, then compile, reaches it"
            rows[name] = _skipped_row(name, reason, spec.name, sorted(kinds))

    def graphs() -> dict[str, GraphModule]:
        found: dict[str, GraphModule] = {}
        for i, (_, record) in enumerate(records):
            found |= {f"graph {i}/{stage}": graph for stage, graph in record.stages().items()}
        return found

    return Report(_user_class(model), "backend", records[0][0], tuple(rows.values()), measurement, graphs)


def _graph_rows(record: Any) -> Iterator[Row]:
    from .passes.find_convolutions import example_value

    kept_of = record.kept_now()
    for decision in record.decisions:
        c = decision.convolution
        values = [example_value(c.arguments.get(k)) for k in ("input", "weight")]
        output = example_value(c.node)
        if any(v is None for v in (*values, output)):
            yield _row(c.layer, c.spec.name, c.kinds, "graph", decision.settings)
            continue
        shapes = [tuple(int(s) for s in v.shape) for v in (*values, output)]
        if len(shapes[0]) == c.spec.dim + 1:
            shapes[0], shapes[2] = (1, *shapes[0]), (1, *shapes[2])
        groups = int(c.arguments.get("groups", 1))
        total = choices(shapes[2][1 if c.spec.dim else -1], groups)
        positions = shapes[0] if c.spec.transposed else shapes[2]
        dense = conv_backward_flops(positions, shapes[1], groups, c.spec.transposed)
        kept = kept_of.get(c.layer, total) if decision.sparse else total
        yield _row(
            c.layer, c.spec.name, c.kinds, "graph", decision.settings, kept, total,
            (shapes[0], shapes[1], shapes[2]), 1, dense,
        )  # fmt: skip


def _merged(a: Row, b: Row) -> Row:
    values = asdict(a)
    for key in ("flops_dense", "flops_now"):
        values[key] = (values[key] or 0) + (getattr(b, key) or 0)
    return Row(**values | {"calls": a.calls + b.calls})


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.layer,
        row.kind,
        row.rung,
        f"{row.drop_rate:g}",
        "?" if row.kept is None else f"{row.kept}/{row.total}",
        "?" if row.output_shape is None else "×".join(map(str, row.output_shape)),
        "?" if row.flops_dense is None else f"{row.flops_dense / 1e6:.1f}",
        "?" if row.flops_now is None else f"{row.flops_now / 1e6:.1f}",
        row.rule,
        row.reason,
    )


def _user_class(model: nn.Module) -> str:
    from .naming import unwrap

    return type(unwrap(model)).__name__


__all__ = ["Report", "Row", "inspect"]
