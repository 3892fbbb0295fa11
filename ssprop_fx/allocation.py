"""How many channels each layer keeps right now: the policy's clock, and the rounding budget of one model."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from ._compat import in_backward
from .errors import SSPropError
from .selection import AUTO, Demand, keep_count, plan_counts

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
    first backward pass of a phase. ``handle`` names the allocation in graphs.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.demands: dict[str, Demand] = {}
        self._provisional: set[str] = set()  # layers whose demand is that of a call without a backward pass
        self._plans: dict[float, dict[str, int]] = {}
        self._register()

    def _register(self) -> None:
        self.handle = f"{self.policy.digest}.{next(_numbers)}"
        _live[self.handle] = self

    def wants(self, layer: str) -> bool:
        """Whether another announcement of the layer could change anything; asked first, since it costs less."""
        return not self._plans or layer not in self.demands

    def announce(
        self, layer: str, channels: int, flops: int, drop_rate: float, granule: int, provisional: bool = False
    ) -> None:
        """Add a call's cost to the layer's demand; ignored once the counts are settled for this layer.

        Args:
            provisional: the call has no backward pass (yet: a checkpointed one runs again). It counts until one that has.
        """
        known = self.demands.get(layer)
        if known is None:
            self._plans.clear()
        elif self._plans or provisional or in_backward():  # in a backward pass, a checkpointed call runs again
            return
        elif layer not in self._provisional:
            flops += known.flops
        self.demands[layer] = Demand(layer, channels, flops, drop_rate, granule)
        (self._provisional.add if provisional else self._provisional.discard)(layer)

    def keep(self, layer: str, channels: int, drop_rate: float, factor: float, round_to: int) -> int:
        """Channels to keep out of ``channels``, at the layer's ``drop_rate`` times the schedule's ``factor``."""
        if round_to != AUTO:
            return keep_count(drop_rate * factor, channels, round_to)
        plan = self._plans.get(factor)
        if plan is None:
            demands = [Demand(d.layer, d.channels, d.flops, d.drop_rate * factor, d.granule) for d in self.demands.values()]
            plan = self._plans[factor] = plan_counts(demands)
        count = plan.get(layer)
        if count is None or self.demands[layer].channels != channels:
            return keep_count(drop_rate * factor, channels)
        return count

    def __getstate__(self) -> dict:
        return {"policy": self.policy, "demands": self.demands}

    def __setstate__(self, state: dict) -> None:
        self.policy, self.demands = state["policy"], state["demands"]
        self._provisional, self._plans = set(self.demands), {}
        self._register()

    def __deepcopy__(self, memo: dict) -> Allocation:
        # a copied model (an EMA, say) trains on the same clock
        return self


def allocation_for(handle: str) -> Allocation:
    """The live allocation that a graph names.

    Raises:
        SSPropError: its model is gone.
    """
    try:
        return _live[handle]
    except KeyError:
        raise SSPropError(
            f"a graph refers to the policy state {handle!r}, which no longer exists in this process; "
            "keep the model that was transformed, or compile the model again"
        ) from None
