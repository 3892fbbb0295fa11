"""What training steps cost: wall time, backward FLOPs, and energy where the machine tells."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ._compat import is_compiled
from .coverage import measure
from .energy import counters
from .errors import SSPropError
from .inspection import Unmeasured, Unreached, inspect, with_its_code
from .naming import unwrap
from .report import Report
from .transform import transformation_of

_LATE = (
    "the model was compiled after it was given to the meter; give a meter what torch.compile returned, or make it after a step"
)


@dataclass(frozen=True)
class Reading:
    """One training step.

    Attributes:
        step: number of the reading, from 0.
        factor: the schedule's, when the step began; 0 for a model without a policy, or if the policy is not known.
        seconds: wall time, the devices' queues run dry at both ends.
        backward_flops: of the whole backward pass, a multiply-add counted as two; None if the meter was given no inputs.
        joules: ``cpu`` and ``cuda``, as far as the machine tells; whole packages and devices, whoever uses them.
    """

    step: int
    factor: float
    seconds: float
    backward_flops: float | None
    joules: dict[str, float]


class Meter:
    """Seconds, backward FLOPs and joules of training steps: ``with meter: ...`` around each of them.

    FLOPs are those of the report (:func:`ssprop_fx.inspect`) for the example inputs at the factor in force: exact for
    batches of that shape, and free. ``print`` it for means and totals.

    Args:
        model: transformed, compiled with the backend ``ssprop``, or an ordinary one to compare with, compiled or not.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, to count FLOPs with: two
            training steps are run on a copy. Without them FLOPs are not known.
        callback: gets every :class:`Reading` as it is made; see :func:`tensorboard`.

    Attributes:
        readings: of the steps so far.
        unknown: what the meter cannot tell, and why.

    Raises:
        SSPropError: what was given is no module, no output of it carries a gradient, or a step begins inside another.

    Examples:
        >>> model = ssprop_fx.transform(torch.nn.Conv2d(3, 8, 3), {"drop_rate": 0.5, "schedule": {"kind": "constant"}})
        >>> batch = torch.randn(2, 3, 16, 16)
        >>> meter = ssprop_fx.Meter(model, batch)
        >>> for _ in range(3):
        ...     with meter:
        ...         model(batch).sum().backward()
        >>> meter.readings[0].backward_flops  # half of a weight gradient's 2 · 2·8·14·14 · 3·3·3
        84672.0
        >>> len(meter.readings)
        3
    """

    def __init__(self, model: nn.Module, example_inputs: Any = None, callback: Callable[[Reading], None] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise SSPropError(
                f"a meter takes a module, got {type(model).__name__}"
                + ("; of a compiled function, give it the model that it calls" if callable(model) else "")
            )
        self.readings: list[Reading] = []
        self.unknown: list[str] = []
        self.callback = callback
        self._devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        self._model = weakref.ref(model)
        self._report, self._dense = self._count(model, example_inputs)
        self._flops: dict[float, float] = {}
        self._counters, reasons = counters(self._devices)
        self.unknown += [f"joules of {reason}" for reason in reasons]
        self._start: tuple[float, float, dict[str, float]] | None = None

    def _count(self, model: nn.Module, example_inputs: Any) -> tuple[Report | None, float | None]:
        ours = transformation_of(model) is not None or is_compiled(model) or _has_graphs(model)
        if example_inputs is None:
            self.unknown.append("backward FLOPs: no example inputs were given")
            try:
                return (inspect(model) if ours else None), None
            except Unreached:
                self.unknown.append(
                    'the schedule\'s factor: no graph of the compiled model has come to the backend "ssprop"; if that is its '
                    "backend, run a step first, or give example inputs"
                )
                return None, None
        if ours:
            try:
                return inspect(model, example_inputs), None
            except Unreached:  # even in the step that this has made: of another backend, all of it is dense
                pass
            except Unmeasured as problem:
                self.unknown.append(f"backward FLOPs: {problem}")
                return inspect(model), None
        return None, float(measure(model, example_inputs).backward_flops)

    def __enter__(self) -> Meter:
        if self._start is not None:
            raise SSPropError("a step of this meter has begun already; one `with meter:` is one step, and they do not nest")
        factor = self._report.factor_at(self._report.policy.steps) if self._report else 0.0
        self._synchronize()  # first: what the step before left in the queue is that step's, in joules, too
        energy = self._energy()
        self._start = time.perf_counter(), factor, energy
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: Any) -> None:
        assert self._start is not None
        (start, factor, before), self._start = self._start, None
        if exception is not None:
            return
        self._synchronize()
        seconds = time.perf_counter() - start
        joules = {name: value - before[name] for name, value in self._energy().items()}
        self._look_again()
        reading = Reading(len(self.readings), factor, seconds, self._backward_flops(factor), joules)
        self.readings.append(reading)
        if self.callback is not None:
            self.callback(reading)

    def _look_again(self) -> None:
        """A model that was an ordinary one may run in a compiled function, which is seen once it did."""
        model = self._model()
        if self._report is not None or model is None or is_compiled(model) or not _has_graphs(model):
            return
        if self._dense is not None:
            try:
                with_its_code(model)
                self.unknown.append(f"backward FLOPs: {_LATE}")
            except Unmeasured as problem:
                self.unknown.append(f"backward FLOPs: {problem}")
        self._dense, self._report = None, inspect(model)

    def _energy(self) -> dict[str, float]:
        return {name: counter.joules() for name, counter in self._counters.items()}

    def _synchronize(self) -> None:
        for device in self._devices:
            torch.cuda.synchronize(device)

    def _backward_flops(self, factor: float) -> float | None:
        if self._report is None or self._dense is not None:
            return self._dense
        if factor not in self._flops and self._report.measurement is not None:
            flops = self._report.at_factor(factor).backward_flops
            if flops is not None:
                self._flops[factor] = float(flops["now"])
        return self._flops.get(factor)

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(r.seconds for r in self.readings)

    @property
    def backward_flops(self) -> float | None:
        """Of all steps; None where they are not known."""
        known = [r.backward_flops for r in self.readings if r.backward_flops is not None]
        return sum(known) if len(known) == len(self.readings) and known else None

    @property
    def joules(self) -> dict[str, float]:
        """Of all steps, by ``cpu`` and ``cuda``; those that the machine does not tell are left out."""
        return {name: sum(r.joules[name] for r in self.readings) for name in self._counters}

    def to_dict(self) -> dict[str, Any]:
        """Totals, readings and what is not known, as plain values for JSON."""
        return {
            "steps": len(self.readings),
            "seconds": self.seconds,
            "backward_flops": self.backward_flops,
            "joules": self.joules,
            "unknown": self.unknown,
            "readings": [vars(reading) for reading in self.readings],
        }

    def __str__(self) -> str:
        steps = len(self.readings)
        if not steps:
            return "\n".join(["no step yet", *(f"unknown: {reason}" for reason in self.unknown)])
        many = "1 step" if steps == 1 else f"{steps} steps"
        lines = [f"{many} in {self.seconds:.3g} s, {1e3 * self.seconds / steps:.4g} ms a step"]
        if self.backward_flops is not None:
            lines.append(f"backward FLOPs: {self.backward_flops:.4g}, {self.backward_flops / steps:.4g} a step")
        lines += [f"{name}: {joules:.4g} J, {joules / steps:.4g} J a step" for name, joules in self.joules.items()]
        return "\n".join(lines + [f"unknown: {reason}" for reason in self.unknown])

    __repr__ = __str__


def _has_graphs(model: nn.Module) -> bool:
    """Whether the backend, if it is there, has made graphs of an uncompiled model's modules."""
    records = sys.modules.get("ssprop_fx.records")
    return records is not None and bool(records.records_of(unwrap(model)))


def tensorboard(writer: Any, prefix: str = "ssprop") -> Callable[[Reading], None]:
    """A callback that writes every reading as scalars.

    Args:
        writer: anything with ``add_scalar(tag, value, step)``, as ``torch.utils.tensorboard.SummaryWriter``.
        prefix: of the tags: ``ssprop/seconds``, ``ssprop/factor``, ``ssprop/backward_flops``, ``ssprop/joules_cpu``.
    """

    def write(reading: Reading) -> None:
        values = {"seconds": reading.seconds, "factor": reading.factor, "backward_flops": reading.backward_flops}
        for name, value in (values | {f"joules_{k}": v for k, v in reading.joules.items()}).items():
            if value is not None:
                writer.add_scalar(f"{prefix}/{name}", value, reading.step)

    return write


__all__ = ["Meter", "Reading", "tensorboard"]
