"""Joules of a training step: blocks of consecutive steps that begin at a tick of an energy counter.

NVML's counter moves every 20 to 100 ms only, so a block takes seconds, and what its last tick says too much is taken off.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from .errors import SSPropError
from .timing import synchronize, take_turns

BLOCKS = 6
SECONDS = {"cuda": 3.0, "cpu": 1.0}  # of a block, at least: RAPL's counter moves every millisecond
_PATIENCE = 5.0  # seconds; a counter that has not moved for so long is none


class Counter(Protocol):
    """Joules since some moment."""

    def joules(self) -> float:
        """Up to the counter's last tick."""


def tick(counter: Counter) -> tuple[float, float]:
    """The moment when the counter moves next, by the host's clock in seconds, and its joules then.

    Raises:
        SSPropError: it stands still.
    """
    before, start = counter.joules(), time.perf_counter()
    while (now := counter.joules()) == before:
        if time.perf_counter() - start > _PATIENCE:
            raise SSPropError(
                f"the energy counter stands still at {before:g} J for {_PATIENCE:g} s. Next step: measure without energy"
            )
        time.sleep(0.0005)
    return time.perf_counter(), now


def per_step(advance: Callable[[], int], counter: Counter, seconds: float) -> float:
    """Joules of a step, from a block of steps that lasts ``seconds`` or somewhat longer.

    The counter is read at a tick just before the block and at the first tick after it. Between the block's end and that tick
    nothing runs; that time is taken off at the power of the interval to the tick after, when nothing runs either.

    Args:
        advance: makes steps without waiting for them, and says how many.

    Raises:
        SSPropError: the counter stands still.
    """
    start, before = tick(counter)
    steps = 0
    while time.perf_counter() - start < seconds:
        steps += advance()
    synchronize()
    end = time.perf_counter()
    first, after = tick(counter)
    second, later = tick(counter)
    idle = (later - after) / (second - first)  # watts
    return (after - before - idle * (first - end)) / steps


def joules_of(advances: Mapping[str, Callable[[], int]], counter: Counter, seconds: float) -> dict[str, list[float]]:
    """Joules a step of each arm, of :data:`BLOCKS` blocks that take turns; a round of blocks before warms the device up.

    Raises:
        SSPropError: the counter stands still.
    """
    blocks = {name: functools.partial(per_step, advance, counter, seconds) for name, advance in advances.items()}
    return take_turns(blocks, BLOCKS, figure=lambda block: block())
