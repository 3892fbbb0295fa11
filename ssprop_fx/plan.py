"""The layers of a report, and how many channels each of their calls keeps at any factor of the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .allocation import Allocation
from .cost import Call
from .policy import Policy, Settings

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
        self._known: dict[float, dict[str, tuple[int, ...]]] = {}

    def __call__(self, factor: float) -> dict[str, tuple[int, ...]]:
        if factor not in self._known:
            counts = {key: d.counts((factor,) * len(d.allocations)) for key, d in self.dispatchers.items()}

            def kept(name: str, settings: Settings, use: Use) -> int:
                if use.dispatcher is not None:
                    return counts[id(use.dispatcher)][use.node]
                return self.allocation.keep(name, use.call.channels, settings.drop_rate, factor, settings.multiple)

            self._known[factor] = {
                name: tuple(kept(name, v.settings, use) for use in v.uses) for name, v in self.layers.items() if v.uses
            }
        return self._known[factor]

    def losses(self, factor: float) -> dict[str, str]:
        """Layers that stay dense at a factor because dropping does not pay, with the measurement."""
        self(factor)
        found = {name: str(timing) for name, timing in self.allocation.losses.get(factor, {}).items()}
        for name, layer in self.layers.items():
            for use in layer.uses:
                if use.dispatcher is not None:
                    at = use.dispatcher.losses.get((factor,) * len(use.dispatcher.allocations), {})
                    if use.node in at:
                        found.setdefault(name, str(at[use.node]))
        return found
