"""``ssprop-fx tune``: time every distinct convolution of a model, and write a policy that leaves dense what does not pay."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml
from torch import nn

from .coverage import MeasuredLayer
from .coverage import measure as measure_step
from .errors import SSPropError
from .masking import is_masked
from .policy import Policy
from .profit import Timing, measure_together, settle
from .rules import Rule
from .selection import Demand, keep_count
from .steps import device_of
from .timing import threads_used, working_on
from .transform import transformed

RATES = (0.5, 0.8, 0.9)


@dataclass(frozen=True)
class TunedShape:
    """Layers whose backward passes are the same work.

    Attributes:
        layers: their names.
        calls: convolution calls of theirs in a step.
        weight: shape, (K, C/g, *kernel) as the function takes it.
        outputs: shapes, (N, K, *spatial), of one layer's calls: more than one where it runs at several sizes.
        channels: how many channels one choice is made from.
        drop_rate: by the policy.
        timing: of one layer in a step, at the policy's rate.
        others: at further rates, (rate, measurement), in the order of the rates.
    """

    layers: tuple[str, ...]
    calls: int
    weight: tuple[int, ...]
    outputs: tuple[tuple[int, ...], ...]
    channels: int
    drop_rate: float
    timing: Timing
    others: tuple[tuple[float, Timing], ...]

    @property
    def reason(self) -> str:
        """Why the layers are left dense or not."""
        text = f"{self.timing.keep} of {self.channels} channels: {self.timing}"
        if self.timing.pays:
            return text
        from_rate = next((rate for rate, t in self.others if rate > self.drop_rate and t.pays), None)
        return f"{text}; " + ("pays at no rate that was tried" if from_rate is None else f"pays at a rate of {from_rate:g}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; times in seconds."""
        return {
            "layers": list(self.layers), "calls": self.calls, "weight": list(self.weight),
            "outputs": [list(sizes) for sizes in self.outputs], "channels": self.channels,
            "drop_rate": self.drop_rate, "kept": self.timing.keep,
            "dense_seconds": self.timing.dense, "sparse_seconds": self.timing.sparse, "pays": self.timing.pays,
            "other_rates": [{"drop_rate": r, "kept": t.keep, "sparse_seconds": t.sparse} for r, t in self.others],
        }  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune` measured.

    Attributes:
        model: class name.
        base: the policy that was given.
        shapes: in the model's order.
        machine: PyTorch's version, device, threads and autocast type, in words.
    """

    model: str
    base: Policy
    shapes: tuple[TunedShape, ...]
    machine: str

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Backward time of the tuned layers in a step: dense, under the policy given, under the tuned one."""
        dense = sum(len(s.layers) * s.timing.dense for s in self.shapes)
        given = sum(len(s.layers) * s.timing.sparse for s in self.shapes)
        tuned = sum(len(s.layers) * (s.timing.sparse if s.timing.pays else s.timing.dense) for s in self.shapes)
        return dense, given, tuned

    def to_policy(self) -> Policy:
        """The policy given, with a rule more for each shape that does not pay."""
        return Policy(**self._contents([self._rule(s) for s in self.shapes if not s.timing.pays]))

    def to_yaml(self) -> str:
        """The same as a policy file, with the reason at each rule."""
        dense, given, tuned = (1e3 * t for t in self.seconds)
        lines = [
            f"# Tuned for {self.model}: {self.machine}.",
            f"# Backward passes of its convolutions in a step: {dense:.1f} ms dense, {given:.1f} ms sparse, "
            f"{tuned:.1f} ms with the last rules.",
        ]
        contents = self._contents([])
        rules = contents.pop("rules", [])
        lines.append(yaml.safe_dump(contents, sort_keys=False).rstrip())
        lines.append("rules:" if rules or not all(s.timing.pays for s in self.shapes) else "rules: []")
        if rules:
            lines += _indented(yaml.safe_dump(rules, sort_keys=False))
        for shape in self.shapes:
            if not shape.timing.pays:
                lines.append(f"  # {shape.reason}")
                lines += _indented(yaml.safe_dump([self._rule(shape)], sort_keys=False))
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; times in seconds."""
        dense, given, tuned = self.seconds
        return {
            "model": self.model, "machine": self.machine, "shapes": [s.to_dict() for s in self.shapes],
            "seconds": {"dense": dense, "policy": given, "tuned": tuned}, "policy": self.to_policy().to_dict(),
        }  # fmt: skip

    def _contents(self, more: list[dict[str, Any]]) -> dict[str, Any]:
        """The policy's contents with ``more`` rules, without those that a rule for what does not pay overrides entirely."""
        contents, new = self.base.to_dict(), [Rule(**self._rule(s)) for s in self.shapes if not s.timing.pays]
        given = zip(self.base.rules, contents.get("rules", []), strict=True)
        kept = [written for rule, written in given if not any(later.hides(rule) for later in new)]
        return contents | {"rules": [*kept, *more]}

    @staticmethod
    def _rule(shape: TunedShape) -> dict[str, Any]:
        return {"layers": [_pattern(name) for name in shape.layers], "drop_rate": 0}


def tune(
    model: nn.Module,
    example_inputs: Any,
    policy: Policy | None = None,
    rates: Sequence[float] = RATES,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
    amp: torch.dtype | None = None,
) -> Tuned:
    """Time the backward pass of every distinct convolution, dense, at the policy's rate and at further rates.

    Args:
        model: any model, in training mode, on its device, in its layout; it is left as it is.
        example_inputs: of the size that it will train on: a tensor, a tuple of positional arguments or a dict.
        policy: decides rates and rounding at the full factor of its schedule; the default policy without.
        rates: further drop rates, to say from which one a layer pays.
        progress: called with (shapes done, shapes, text).
        amp: autocast type that it will train with: the type of the convolutions that are timed.

    Raises:
        SSPropError: nothing of the model has a drop rate above zero, or its outputs carry no gradient.
    """
    with working_on(device_of(model)):
        return _tuned(model, example_inputs, policy or Policy(), rates, progress, amp)


def _tuned(
    model: nn.Module, example_inputs: Any, policy: Policy, rates: Sequence[float], progress: Callable[[int, int, str], None],
    amp: torch.dtype | None,
) -> Tuned:  # fmt: skip
    with torch.autocast(device_of(model).type, amp, enabled=amp is not None):
        found = measure_step(transformed(model, policy), example_inputs).layers
    layers = {
        name: layer
        for name, layer in found.items()
        if layer.settings.drop_rate > 0 and layer.calls and not is_masked(layer.settings.ranking)
    }
    if not layers:
        raise SSPropError("there is nothing to tune: the policy drops nothing in any convolution of the model")
    counts, _ = settle([_demand(name, layer) for name, layer in layers.items()], measured=False)
    alike: dict[tuple, list[str]] = {}
    for name, layer in layers.items():
        s = layer.settings
        work = frozenset(Counter(layer.calls).items())
        alike.setdefault((work, counts[name], s.drop_rate, s.criterion, s.gradients), []).append(name)
    shapes = []
    for done, ((work, keep, rate, criterion, gradients), names) in enumerate(alike.items()):
        calls = layers[names[0]].calls
        call = calls[0]
        progress(done, len(alike), f"{names[0]} {'×'.join(map(str, call.weight))}")
        further = {r: keep_count(r, call.channels) for r in sorted(rates) if r != rate}
        first, *others = measure_together(dict(work), [keep, *further.values()], criterion, gradients)
        shapes.append(
            TunedShape(
                tuple(names),
                len(names) * len(calls),
                call.weight,
                tuple(dict.fromkeys(c.output for c in calls)),
                call.channels,
                rate,
                first,
                tuple(zip(further, others, strict=True)),
            )
        )
    progress(len(alike), len(alike), "")
    device = next(iter(layers.values())).calls[0].device
    threads = f", {threads_used()}" if device == "cpu" else f" ({torch.cuda.get_device_name()})"
    autocast = f", autocast {str(amp).removeprefix('torch.')}" if amp else ""
    return Tuned(type(model).__name__, policy, tuple(shapes), f"PyTorch {torch.__version__}, {device}{threads}{autocast}")


def _demand(name: str, layer: MeasuredLayer) -> Demand:
    s = layer.settings
    demands = [call.demand(name, s.drop_rate, s.multiple, s.criterion, s.gradients) for call in layer.calls]
    return replace(demands[0], flops=sum(d.flops for d in demands), calls=tuple(layer.calls))


def _pattern(name: str) -> str:
    """A pattern that matches the name and nothing else."""
    return f"re:{re.escape(name)}" if set(name) & set("*?[") else name


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.rstrip().splitlines()]
