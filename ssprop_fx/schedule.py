"""When a policy is in force: the factor over steps, and the clock that counts the steps."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal
from weakref import WeakKeyDictionary, WeakSet

from pydantic import Field

from .errors import Checked, PolicyError, Problem, nearest
from .optimizers import after_each_step

logger = logging.getLogger(__name__)

_Factor = Annotated[float, Field(ge=0, le=1)]
_Steps = Annotated[int, Field(ge=0)]


class Schedule(Checked):
    """The factor, between 0 and 1, that multiplies every drop rate of a policy, as a function of the step.

    Step t counts from 0: it is the number of times that the clock has advanced. In order of precedence:

    1. warm-up: 0 while ``t < warmup``; cool-down: 0 from ``t >= total - cooldown`` on, if ``cooldown > 0``.
    2. interleave: 0 where ``u = t - warmup`` is even. Periods count in u, too: they begin after the warm-up.
    3. kind: ``constant`` is ``end``. ``bar`` is ``start`` for the first ``period // 2`` steps of a period,
       then ``end``. ``linear`` and ``cosine`` go from ``start`` at its first step to ``end`` at its last.

    ``linear`` and ``cosine`` with ``repeat: false`` hold ``end`` after one period; ``bar`` always repeats.
    Without a cool-down ``total`` ends nothing. The bar schedule is that of ssProp, arXiv 2408.12561.

    Raises:
        PolicyError: a key is unknown or its value out of range, ``cooldown`` lacks ``total``, or ``warmup``
            and ``cooldown`` together exceed ``total``.

    Examples:
        >>> schedule = Schedule(kind="linear", period=5)
        >>> [schedule.factor(t) for t in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 0.0]
    """

    kind: Literal["constant", "linear", "cosine", "bar"] = Field(
        default="bar", description="How the factor goes over a period."
    )
    start: _Factor = Field(default=0.0, description="Factor at the start of a period.")
    end: _Factor = Field(default=1.0, description="Factor at the end of a period.")
    period: Annotated[int, Field(ge=1)] = Field(default=2, description="Length of a period in steps.")
    repeat: bool = Field(default=True, description="Begin again after each period (bar always does), or hold the factor `end`.")
    warmup: _Steps = Field(default=0, description="Dense steps first.")
    cooldown: _Steps = Field(default=0, description="Dense steps last; needs `total`.")
    total: Annotated[int, Field(ge=1)] | None = Field(default=None, description="Steps in all, warm-up and cool-down included.")
    interleave: bool = Field(default=False, description="Dense on every other step, the first included, whatever the kind.")
    clock: Literal["manual", "optimizer"] = Field(
        default="manual",
        description="What advances the step: policy.step(), or every step of any torch.optim optimizer.",
    )
    levels: Annotated[int, Field(ge=1)] = Field(
        default=4,
        description="Distinct factors that a linear or cosine schedule is rounded to when compiled, evenly "
        "spaced from the smaller of start and end to the larger; 1 is `end` alone.",
    )

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        schema = handler(core_schema)
        handler.resolve_ref_schema(schema).update(
            {
                "if": {"required": ["cooldown"], "properties": {"cooldown": {"exclusiveMinimum": 0}}},
                "then": {"required": ["total"], "properties": {"total": {"type": "integer"}}},
            }
        )
        return schema

    @classmethod
    def _relations(cls, data: Mapping[str, Any], broken: Collection[str]) -> list[Problem]:
        if not {"warmup", "cooldown", "total"}.isdisjoint(broken):
            return []
        warmup, cooldown, total = data.get("warmup", 0), data.get("cooldown", 0), data.get("total")
        if total is None:
            if cooldown == 0:
                return []
            what, expected = (
                f"a cooldown of {cooldown} without total",
                "the number of steps in all, as `total`",
            )
            return [Problem("Schedule(...)", "cooldown", what, expected, "add `total`, or delete `cooldown`")]
        if warmup + cooldown <= total:
            return []
        what = f"{total} steps in all are fewer than the {warmup} of warm-up and {cooldown} of cool-down"
        least = str(warmup + cooldown)
        return [Problem("Schedule(...)", "total", what, "warmup + cooldown <= total", f"write at least {least}", least)]

    def factor(self, step: int) -> float:
        """The factor at ``step``, counted from 0: a pure function."""
        if self._dense(step):
            return 0.0
        since = step - self.warmup
        within = since % self.period
        if self.kind == "bar":
            return self.start if within < self.period // 2 else self.end
        if self.kind == "constant" or within == self.period - 1 or not (self.repeat or since < self.period):
            return self.end
        x = within / (self.period - 1)
        if self.kind == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        return self.start + (self.end - self.start) * x

    def quantized_factor(self, step: int) -> float:
        """:meth:`factor` rounded to the nearest of ``levels`` values, halves up, so that phases are few.

        The 0 of warm-up, cool-down and interleave is exact, as are the factors of ``constant`` and ``bar``.
        """
        factor = self.factor(step)
        if self.kind in ("bar", "constant") or self._dense(step):
            return factor
        low, high = sorted((self.start, self.end))
        if low == high or self.levels == 1:
            return self.end
        share = math.floor((factor - low) / (high - low) * (self.levels - 1) + 0.5) / (self.levels - 1)
        return low * (1 - share) + high * share

    @property
    def moves(self) -> bool:
        """Whether the factor is ever another than at step 0."""
        if self.warmup or self.cooldown or self.interleave:
            return True
        return self.kind != "constant" and self.period > 1 and self.start != self.end

    def _dense(self, step: int) -> bool:
        """Whether warm-up, cool-down or interleave, which go before the kind, make this step dense."""
        if step < self.warmup or (self.interleave and (step - self.warmup) % 2 == 0):
            return True
        return self.total is not None and self.cooldown > 0 and step >= self.total - self.cooldown


class Clock:
    """The one moving part of a policy: its step, and the schedule's factors at that step, ready to read.

    Attributes:
        steps: advances so far.
        factor: exact factor of the current step.
        quantized_factor: the factor that compiled code uses.
        mode: ``manual`` or ``optimizer``, whichever advances the clock now.
        ticked: an optimizer has advanced the clock since it was made or set.

    A clock in mode ``optimizer`` advances with every step of any ``torch.optim`` optimizer in the process, with two
    optimizers twice as fast; a step inside of another one is part of that. The first :meth:`step` takes it over: from
    then on it is manual.
    """

    __slots__ = ("__weakref__", "factor", "mode", "quantized_factor", "schedule", "steps", "ticked")

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.set(0, schedule.clock)

    def set(self, steps: int, mode: Literal["manual", "optimizer"], ticked: bool = False) -> None:
        """Go to a state."""
        self.mode = mode
        self.ticked = ticked
        self._go_to(steps)
        if mode == "optimizer":
            _listen()
            _automatic.add(self)
        else:
            _automatic.discard(self)

    def step(self) -> None:
        """Advance by one step, for a caller that counts the steps itself.

        The call that takes over an optimizer clock stands for the advance that the optimizer has just made,
        if it has made one since the clock was made or set: ``optimizer.step(); policy.step()`` is one step.
        """
        if self.mode == "optimizer":
            logger.info("policy.step() was called although clock is 'optimizer': from now on the clock is manual")
            self.set(self.steps if self.ticked else self.steps + 1, "manual")
        else:
            self._go_to(self.steps + 1)

    def warn_if_idle(self, held: bool) -> None:
        """Tell, once, if optimizers make step after step and this clock none.

        Args:
            held: a user has the policy and may step it, once an epoch, too: a line in the log after 500 optimizer steps.
                Otherwise perhaps nobody can: a warning after ten.
        """
        if self.mode == "manual" and self.schedule.moves and self.steps == 0:
            _listen()
            _watched.setdefault(self, _Watch(held))

    def state_dict(self) -> dict[str, Any]:
        """``steps``, the mode as ``clock``, and ``schedule``, as plain values."""
        return {"steps": self.steps, "clock": self.mode, "schedule": self.schedule.model_dump(mode="json")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a state of the same schedule.

        Raises:
            PolicyError: the state is malformed or of another schedule; the clock stays as it is.
        """
        if problems := list(_state_problems(state, self.state_dict())):
            raise PolicyError(problems)
        self.set(state["steps"], state["clock"])

    def _tick(self) -> None:
        self.ticked = True
        self._go_to(self.steps + 1)

    def _go_to(self, steps: int) -> None:
        self.steps = steps
        self.factor = self.schedule.factor(steps)
        self.quantized_factor = self.schedule.quantized_factor(steps)


_automatic: WeakSet[Clock] = WeakSet()


@dataclass
class _Watch:
    """Optimizer steps that a clock has seen, itself at step 0; and whether a user holds its policy."""

    held: bool
    seen: int = 0


_watched: WeakKeyDictionary[Clock, _Watch] = WeakKeyDictionary()
_PATIENCE = 10
_PATIENCE_IF_HELD = 500  # an epoch of a small data set is shorter: CIFAR-10 has 391 batches of 128, Fashion-MNIST 469


@contextlib.contextmanager
def clocks_put_back() -> Iterator[None]:
    """Whatever optimizers do to clocks meanwhile is undone."""
    states = [(clock, clock.steps, clock.mode, clock.ticked) for clock in _automatic]
    try:
        yield
    finally:
        for clock, steps, mode, ticked in states:
            clock.set(steps, mode, ticked)


@cache
def _listen() -> None:
    """Hear of every optimizer step from now on; once a process, at the first clock that needs it."""
    after_each_step(_after_optimizer_step)


def _after_optimizer_step() -> None:
    for clock in list(_automatic):
        clock._tick()
    for clock, watch in list(_watched.items()):
        if clock.steps:
            del _watched[clock]
            continue
        watch.seen += 1  # it stays, so that it is told once, however many graphs are compiled
        if watch.held and watch.seen == _PATIENCE_IF_HELD:
            logger.warning(
                "%d optimizer steps were made, and the schedule of a policy is still at step 0, factor %g: its clock is "
                "manual. Call policy.step() after optimizer.step(), or set `clock: optimizer` in the schedule; if you "
                "call it once an epoch, and this is the first, all is well",
                watch.seen,
                clock.factor,
            )
        elif not watch.held and watch.seen == _PATIENCE:
            warnings.warn(
                f"{_PATIENCE} optimizer steps were made, and the schedule of a policy is still at step 0: its clock is "
                "manual, and it was given as a path or mapping, so that nobody holds it to call policy.step(); pass a "
                "Policy object (ssprop_fx.Policy.load(...)) and step that, or set `clock: optimizer` in the schedule",
                stacklevel=2,
            )


def _state_problems(state: Any, own: Mapping[str, Any]) -> Iterator[Problem]:
    """What keeps ``state`` from being loaded into a clock whose present state is ``own``."""
    where, step = "policy.load_state_dict(...)", "load what policy.state_dict() returned"
    keys = f"a mapping with the keys {', '.join(own)}"
    if not isinstance(state, Mapping):
        yield Problem(where, "", f"the state is of type {type(state).__name__}", keys, step)
        return
    for key in own:
        if key not in state:
            yield Problem(where, key, "the key is missing", keys, step)
    for key in state:
        if key not in own:
            yield Problem(where, str(key), "unknown key", keys, step, nearest(str(key), own))
    steps, mode, saved = (state.get(key, own[key]) for key in own)
    mine = own["schedule"]
    if type(steps) is not int or steps < 0:
        yield Problem(where, "steps", f"{steps!r} is no number of steps", "a whole number >= 0", step)
    modes = list(dict.fromkeys(["manual", mine["clock"]]))
    if mode not in modes:
        yield Problem(where, "clock", f"{mode!r} is no clock of this policy", " or ".join(modes), step)
    if not isinstance(saved, Mapping):
        yield Problem(where, "schedule", f"the schedule is of type {type(saved).__name__}", "a mapping", step)
        return
    for key in [*mine, *(key for key in saved if key not in mine)]:
        if saved.get(key, ...) != mine.get(key, ...):
            was, here = (repr(of[key]) if key in of else "no such key" for of in (saved, mine))
            what = f"the state was saved with {was}, this policy has {here}"
            step = "use the schedule that the state was saved with, or start without the state"
            yield Problem(where, f"schedule.{key}", what, "the same schedule", step)
