"""How many channels each layer keeps right now: the policy's clock, and the rounding budget of one model."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from dataclasses import astuple, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from ._compat import in_backward
from .errors import SSPropError
from .profit import Timing, settle
from .recent import MOST, Recent
from .selection import AUTO, Demand, keep_count

if TYPE_CHECKING:
    from .policy import Policy

# Whoever measures coverage puts a function here; it gets the layer of each backward pass that follows a policy.
observers: list[Callable[[str], None]] = []

_live: weakref.WeakValueDictionary[str, Allocation] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Plan(NamedTuple):
    """Channels to keep at one factor of the schedule, by layer, and why some layers stay dense."""

    kept: dict[str, int]
    losses: dict[str, Timing]


_NO_PLAN = (-1.0, Plan({}, {}))


class Allocation:
    """The kept channels of one model's layers under one policy, looked up by layer while it trains.

    With ``round_to: auto`` the count of a layer depends on the others (the total stays within 2 % of what was asked), so
    layers announce their demand when they run forward and the counts are settled at the first backward pass of a phase. With
    ``profitable: auto`` they say enough for being timed, too. ``handle`` names the allocation in graphs.

    A plan is a function of the demands and the factor. Those of the factors that came last are kept, since a schedule may
    come to as many factors as there are steps.

    Args:
        live: a model trains by it. A report's is not: it has no part in the policy's state, and later states none in it.
    """

    _plans: Recent[float, Plan]
    _last: tuple[float, Plan]  # the factor that was asked for last, and its plan

    def __init__(self, policy: Policy, live: bool = True) -> None:
        self.policy = policy
        self._snapshot = None if live else policy.remembered
        self.handle = ""
        self.measures = policy.profitable == "auto"
        self.demands: dict[str, Demand] = {}
        self._provisional: set[str] = set()  # layers whose demand is that of a call without a backward pass
        self._idle: set[str] = set()  # those of them that have only run where no gradient is recorded
        self._unsettle()
        if live:
            self._register()

    @property
    def _remembered(self) -> dict[str, dict]:
        return self.policy.remembered if self._snapshot is None else self._snapshot

    def _register(self) -> None:
        self.handle = f"{self.policy.digest}.{next(_numbers)}"
        _live[self.handle] = self

    def wants(self, layer: str, round_to: int, trains: bool = True) -> bool:
        """Whether another announcement of the layer could change anything; asked first, since it costs less."""
        known = layer in self.demands and not (trains and layer in self._idle)
        return (round_to == AUTO or self.measures) and (not self._plans or not known)

    def announce(self, demand: Demand, provisional: bool = False) -> None:
        """Add a call's cost to its layer's demand; ignored once the counts are settled for this layer.

        Args:
            provisional: the call has no backward pass (yet: a checkpointed one runs again). It counts until one that has.
        """
        layer = demand.layer
        idle = _is_idle(demand)
        known = None if layer in self._idle and not idle else self.demands.get(layer)
        if known is None:
            if self._plans:  # a layer that runs for the first time; what others announce from here on is another step's
                self._provisional.update(self.demands)
                self._unsettle()
        elif self._plans or provisional or in_backward():  # in a backward pass, a checkpointed call runs again
            return
        elif layer not in self._provisional:
            demand = replace(demand, flops=known.flops + demand.flops, calls=known.calls + demand.calls)
        remembered = self._remembered["flops"].get(layer)
        self.demands[layer] = demand if remembered is None else replace(demand, flops=remembered)
        (self._provisional.add if provisional else self._provisional.discard)(layer)
        (self._idle.add if idle else self._idle.discard)(layer)

    def keep(self, layer: str, channels: int, drop_rate: float, factor: float, round_to: int) -> int:
        """Channels to keep out of ``channels``, at the layer's ``drop_rate`` times the schedule's ``factor``."""
        if round_to != AUTO and not self.measures:
            return keep_count(drop_rate * factor, channels, round_to)
        count = self.plan(factor).kept.get(layer)
        if count is None or self.demands[layer].channels != channels:
            return keep_count(drop_rate * factor, channels, round_to or 1)
        return count

    def plan(self, factor: float) -> Plan:
        """What is settled at the schedule's ``factor``, for the layers that have announced themselves so far."""
        last, plan = self._last  # together: another thread may set them
        if last != factor:
            plan = self._plans.use(factor, self._settle)
            self._last = factor, plan
        return plan

    def _settle(self, factor: float) -> Plan:
        kept = self._remembered["kept"].get(factor, {})
        # a teacher that never trains has no part in the budget; before the first step nobody knows who trains
        weighed = {name: d for name, d in self.demands.items() if not _is_idle(d)} or self.demands
        if weighed.keys() <= kept.keys():
            losses = self._remembered["losses"].get(factor, {})
            return Plan(kept, {name: Timing(*figures) for name, figures in losses.items() if name in self.demands})
        # by name, so that neither the order of running nor that of a report decides among equal layers
        demands = [replace(d, drop_rate=d.drop_rate * factor) for _, d in sorted(weighed.items())]
        return Plan(*settle(demands, self.measures))

    def _unsettle(self) -> None:
        self._plans, self._last = Recent(), _NO_PLAN

    def stays_dense(self, layer: str, factor: float) -> bool:
        """Whether the layer was found to be slower sparse, at the schedule's ``factor``; False before that is settled."""
        return self.measures and (plan := self._plans.get(factor)) is not None and layer in plan.losses

    def forget(self) -> None:
        """Settle all counts anew."""
        self.demands.clear()
        self._provisional.clear()
        self._idle.clear()
        self._unsettle()

    def __getstate__(self) -> dict:
        return {"policy": self.policy, "demands": self.demands}

    def __setstate__(self, state: dict) -> None:
        self.policy, self.demands, self._snapshot = state["policy"], state["demands"], None
        self.measures = self.policy.profitable == "auto"
        self._provisional = set(self.demands)
        self._idle = {name for name, demand in self.demands.items() if _is_idle(demand)}
        self._unsettle()
        self._register()

    def __deepcopy__(self, memo: dict) -> Allocation:
        """Itself, since a copied model (an EMA, say) trains on the same clock; of a policy that is copied, too, another one."""
        policy = memo.get(id(self.policy))
        if policy is None:
            return self
        copied = type(self).__new__(type(self))
        copied.__setstate__({"policy": policy, "demands": dict(self.demands)})
        return copied


def _is_idle(demand: Demand) -> bool:
    """Whether a demand is of calls where no gradient is recorded, and which nothing is known to run again."""
    return bool(demand.calls) and all(call.needs is None for call in demand.calls)


class Follower:
    """A part of a transformed model that has its allocation at hand."""

    allocation: Allocation


def take_along(policy: Policy, memo: dict) -> None:
    """Let what a deep copy has made of models so far follow the copy of their ``policy``, which is in its memo by now.

    An object that holds both, a trainer or a system, is copied attribute by attribute, and the model may come first.
    """
    for copied in list(memo.values()):
        if isinstance(copied, Follower) and copied.allocation.policy is policy:
            copied.allocation = copy.deepcopy(copied.allocation, memo)


def allocations_of(policy: Policy) -> list[Allocation]:
    """The live allocations under a policy."""
    return [live for live in list(_live.values()) if live.policy is policy]


def settled(policy: Policy) -> dict[str, dict]:
    """What the models under a policy have settled: ``flops`` by layer; by factor and layer, ``kept`` counts and ``losses``.

    All depend on the sizes of the inputs that came first, which a resumed run does not see again; so they belong to the
    policy's state. A loss is the fields of a :class:`ssprop_fx.profit.Timing`. Layers of the same name that two models have
    settled differently are left out, and so are all but the factors that came last, which stand in that order.
    """
    live = allocations_of(policy)
    flops = dict(policy.remembered["flops"])
    newest = [f for of_each in zip_longest(*(reversed(list(a._plans)) for a in live)) for f in of_each if f is not None]
    used = list(dict.fromkeys([*newest, *reversed(policy.remembered["kept"])]))[:MOST][::-1]
    kept, losses = ({f: dict(policy.remembered[key].get(f, {})) for f in used} for key in ("kept", "losses"))
    seen: dict[tuple, int] = {}
    for allocation in live:
        values: list[tuple[dict, tuple, Any]] = [
            (flops, ("flops", d.layer), d.flops) for d in allocation.demands.values() if d.layer not in allocation._provisional
        ]
        for factor, plan in list(allocation._plans.items()):
            if factor in used:
                values += [(kept[factor], ("kept", factor, layer), count) for layer, count in plan.kept.items()]
                values += [(losses[factor], ("losses", factor, name), list(astuple(t))) for name, t in plan.losses.items()]
        for place, path, value in values:
            if seen.setdefault(path, value) == value:
                place[path[-1]] = value
            else:
                place.pop(path[-1], None)
    return {"flops": flops, **{key: {f: v for f, v in by.items() if v} for key, by in (("kept", kept), ("losses", losses))}}


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
