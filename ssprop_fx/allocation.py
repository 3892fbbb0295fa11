"""How many channels each layer keeps right now: the policy's clock, and the rounding budget of one model."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ._compat import in_backward
from .errors import SSPropError
from .profit import Timing, settle
from .selection import AUTO, Demand, keep_count

if TYPE_CHECKING:
    from .policy import Policy

# Whoever measures coverage puts a function here; it gets the layer of each backward pass that follows a policy.
observers: list[Callable[[str], None]] = []

_live: weakref.WeakValueDictionary[str, Allocation] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Allocation:
    """The kept channels of one model's layers under one policy, looked up by layer while it trains.

    With ``round_to: auto`` the count of a layer depends on the others (section 3 of the design: the total stays within
    2 % of what was asked), so layers announce their demand when they run forward and the counts are settled at the
    first backward pass of a phase. With ``profitable: auto`` they say enough for being timed, too. ``handle`` names the
    allocation in graphs; ``losses`` holds, by factor and layer, why a layer stays dense.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.measures = policy.profitable == "auto"
        self.demands: dict[str, Demand] = {}
        self._provisional: set[str] = set()  # layers whose demand is that of a call without a backward pass
        self._plans: dict[float, dict[str, int]] = {}
        self.losses: dict[float, dict[str, Timing]] = {}
        self._register()

    def _register(self) -> None:
        self.handle = f"{self.policy.digest}.{next(_numbers)}"
        _live[self.handle] = self

    def wants(self, layer: str) -> bool:
        """Whether another announcement of the layer could change anything; asked first, since it costs less."""
        return not self._plans or layer not in self.demands

    def announce(self, demand: Demand, provisional: bool = False) -> None:
        """Add a call's cost to its layer's demand; ignored once the counts are settled for this layer.

        Args:
            provisional: the call has no backward pass (yet: a checkpointed one runs again). It counts until one that has.
        """
        layer = demand.layer
        known = self.demands.get(layer)
        if known is None:
            if self._plans:  # a layer that runs for the first time; what others announce from here on is another step's
                self._provisional.update(self.demands)
                self._plans.clear()
        elif self._plans or provisional or in_backward():  # in a backward pass, a checkpointed call runs again
            return
        elif layer not in self._provisional:
            demand = replace(demand, flops=demand.flops + known.flops)
        self.demands[layer] = demand
        (self._provisional.add if provisional else self._provisional.discard)(layer)

    def keep(self, layer: str, channels: int, drop_rate: float, factor: float, round_to: int) -> int:
        """Channels to keep out of ``channels``, at the layer's ``drop_rate`` times the schedule's ``factor``."""
        if round_to != AUTO and not self.measures:
            return keep_count(drop_rate * factor, channels, round_to)
        plan = self._plans.get(factor)
        if plan is None:
            demands = [replace(d, drop_rate=d.drop_rate * factor) for d in self.demands.values()]
            plan, self.losses[factor] = settle(demands, self.measures)
            self._plans[factor] = plan
        count = plan.get(layer)
        if count is None or self.demands[layer].channels != channels:
            return keep_count(drop_rate * factor, channels, round_to or 1)
        return count

    def __getstate__(self) -> dict:
        return {"policy": self.policy, "demands": self.demands}

    def __setstate__(self, state: dict) -> None:
        self.policy, self.demands = state["policy"], state["demands"]
        self.measures = self.policy.profitable == "auto"
        self._provisional, self._plans, self.losses = set(self.demands), {}, {}
        self._register()

    def __deepcopy__(self, memo: dict) -> Allocation:
        # a copied model (an EMA, say) trains on the same clock
        return self


def live_allocation(handle: str) -> Allocation | None:
    """The live allocation that a graph names, if there is one."""
    return _live.get(handle)


def allocation_for(handle: str) -> Allocation:
    """The live allocation that a graph names.

    Raises:
        SSPropError: its model is gone.
    """
    live = _live.get(handle)
    if live is None:
        raise SSPropError(
            f"a graph refers to the policy state {handle!r}, which no longer exists in this process; "
            "keep the model that was transformed, or compile the model again"
        )
    return live
