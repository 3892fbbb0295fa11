"""The layers of a report, their rows, and how many channels each of their calls keeps at any factor of the schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from .allocation import Allocation
from .cost import Call, total_bytes, total_flops
from .coverage import Measurement
from .dataflow import Capture
from .masking import is_masked
from .policy import KINDS, Policy, Settings
from .recent import Recent
from .report import Report
from .rows import Row

if TYPE_CHECKING:
    from .phases import PhaseDispatcher


@dataclass(frozen=True)
class Use:
    """A call of a layer; ``dispatcher`` and ``node`` where a compiled backward decides how many channels it keeps."""

    call: Call
    dispatcher: PhaseDispatcher | None = None
    node: str = ""


@dataclass(frozen=True)
class Layer:
    """A convolution layer with all its calls in a step, as far as they are known."""

    kind: str
    kinds: frozenset[str]
    rung: str
    settings: Settings
    uses: tuple[Use, ...]


class LivePlan:
    """Kept counts at any factor, by the code that decides them in training.

    Args:
        demands: what the layers have announced already; the others announce what their calls would.
    """

    def __init__(self, policy: Policy, layers: Mapping[str, Layer], demands: Mapping[str, Any]) -> None:
        self.layers, self.allocation = layers, Allocation(policy, live=False)
        self.allocation.demands.update(demands)
        for name, layer in layers.items():
            s = layer.settings
            counts_on_others = s.round_to == "auto" or self.allocation.measures
            if name not in demands and s.drop_rate > 0 and counts_on_others:
                for use in layer.uses:
                    if use.dispatcher is None:
                        demand = use.call.demand(name, s.drop_rate, s.multiple, s.ranking, s.gradients)
                        self.allocation.announce(demand)
        self.dispatchers = {
            id(use.dispatcher): use.dispatcher for layer in layers.values() for use in layer.uses if use.dispatcher
        }
        self._known: Recent[float, tuple[dict[str, tuple[int, ...]], dict[str, str]]] = Recent()

    def __call__(self, factor: float) -> dict[str, tuple[int, ...]]:
        return self._known.use(factor, self._at)[0]

    def losses(self, factor: float) -> dict[str, str]:
        """Layers that stay dense at a factor because dropping does not pay, with the measurement."""
        return self._known.use(factor, self._at)[1]

    def _at(self, factor: float) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        counts = {key: d.counts((factor,) * len(d.allocations)) for key, d in self.dispatchers.items()}

        def count(name: str, settings: Settings, use: Use) -> int:
            if use.dispatcher is not None:
                return counts[id(use.dispatcher)][use.node]
            return self.allocation.keep(name, use.call.channels, settings.drop_rate, factor, settings.multiple)

        kept = {name: tuple(count(name, v.settings, use) for use in v.uses) for name, v in self.layers.items() if v.uses}
        losses = {name: str(timing) for name, timing in self.allocation.plan(factor).losses.items()}
        for name, layer in self.layers.items():
            for use in layer.uses:
                if use.dispatcher is not None:
                    at = use.dispatcher.losses.get((factor,) * len(use.dispatcher.allocations), {})
                    if use.node in at:
                        losses.setdefault(name, str(at[use.node]))
        return kept, losses


def report_of(
    model: nn.Module,
    front_end: str,
    policy: Policy,
    layers: Mapping[str, Layer],
    left: Sequence[Row],
    demands: Mapping[str, Any],
    measurement: Measurement | None,
    quantized: bool,
    captures: Callable[[], list[Capture]],
    modules: Mapping[str, frozenset[str]],
) -> Report:
    """The report at the policy's present step.

    Args:
        modules: kinds of the convolution and linear modules that there are, those without a row included.
    """
    calls = {name: tuple(use.call for use in layer.uses) for name, layer in layers.items() if layer.uses}
    plan = LivePlan(policy, layers, demands)
    if measurement is not None and policy.profitable == "auto":
        lost = sum(measurement.calls.get(name, 0) for name in plan.losses(1.0))
        measurement = replace(measurement, sparse=measurement.sparse - lost, unprofitable=lost)
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
        _unmatched(policy, layers, left, modules) if calls or measurement is not None else (),
        plan,
        captures,
    )
    return report.at(policy.steps)


def _unmatched(
    policy: Policy, layers: Mapping[str, Layer], left: Sequence[Row], modules: Mapping[str, frozenset[str]]
) -> tuple[str, ...]:
    """Functional calls are known once they have been made; a rule for one that is none cannot be told before."""
    found = {**modules, **{row.layer: frozenset(row.kinds) or frozenset(KINDS) for row in left}}
    found |= {name: layer.kinds for name, layer in layers.items()}
    told = []
    for problem in policy.unmatched_rules(found):
        near = f"; nearest: {problem.nearest}" if problem.nearest else ""
        told.append(f"{problem.where}: {problem.key}: {problem.what}{near}")
    return tuple(told)


def _row(name: str, layer: Layer, measurement: Measurement | None) -> Row:
    settings, first = layer.settings, layer.uses[0].call if layer.uses else None
    calls = tuple(use.call for use in layer.uses)
    reason = "drop rate 0" if settings.drop_rate == 0 else ""
    if not reason and calls and not any(any(c.needs or (True,)) for c in calls):
        reason = "no gradient is computed"
    if not reason and measurement is not None and name in measurement.missed:
        reason = f"{measurement.missed[name][0]} of its calls in no captured graph; transform first, then compile, reaches them"
    if not reason and measurement is not None and not calls and not measurement.calls.get(name):
        called = name in measurement.layers and measurement.layers[name].called
        reason = f"no {'backward pass' if called else 'call'} in the measured step"
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


def left_row(layer: str, reason: str, kind: str = "?", kinds: Sequence[str] = ()) -> Row:
    return Row(
        layer=layer, kind=kind, kinds=tuple(kinds), rung="-", rule="-", drop_rate=0.0, criterion="-", round_to="-",
        gradients="-", kept=None, total=None, input_shape=None, weight_shape=None, output_shape=None, calls=1,
        flops_dense=None, flops_now=None, grad_bytes_dense=None, grad_bytes_now=None, reason=reason,
    )  # fmt: skip
