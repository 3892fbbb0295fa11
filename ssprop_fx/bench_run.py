"""One arm of :mod:`ssprop_fx.bench`: a model that is ready to make training steps, and their times and memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .arms import ARMS, freeze
from .inspection import inspect
from .policy import Policy
from .report import Report
from .steps import call_model, device_of
from .timing import Laps, synchronize, timed


class Run:
    """One arm's model, ready to make steps: forward, loss, backward, no optimizer.

    Args:
        name: of :data:`ssprop_fx.arms.ARMS`.
        model: a copy of its own.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        loss: the model's result → a scalar.
        amp: autocast type of the forward pass; None without autocast.

    Attributes:
        device: that the model is on.
        first: seconds of the first step, compilation included.
        splits: seconds of forward and backward, of every round so far; means where a round has several steps.
    """

    def __init__(self, name: str, model: nn.Module, inputs: Any, policy: Policy, loss: Any, amp: torch.dtype | None) -> None:
        self.name, self.inputs, self.loss, self.amp = name, inputs, loss, amp
        self.device = device_of(model)
        self.splits: list[tuple[float, float]] = []
        if name == "frozen":
            freeze(model, self._forward_of(model), policy)
        self.model = ARMS[name].build(model, policy)
        self.first = timed(self)

    def _forward_of(self, model: Any) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
                return self.loss(call_model(model, self.inputs))

        return forward

    def __call__(self) -> None:
        """A round: as many steps as the arm has, each waited for and timed."""
        parts = [self._step() for _ in range(ARMS[self.name].steps)]
        self.splits.append((statistics.mean(f for f, _ in parts), statistics.mean(b for _, b in parts)))

    def _step(self) -> tuple[float, float]:
        synchronize()  # an event of a device that is still busy would be one of the step before
        laps = Laps(self.device)
        laps.mark()
        result = self._forward_of(self.model)()
        laps.mark()
        result.backward()
        laps.mark()
        forward, backward = laps.seconds()
        self._forget()
        return forward, backward

    def _forget(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def seconds(self) -> float:
        """Of a step, the mean of a round: by the device's events on CUDA, elsewhere by the host's clock around the round."""
        if self.device.type != "cuda":
            return timed(self) / ARMS[self.name].steps
        self()
        return sum(self.splits[-1])

    def advance(self) -> int:
        """A round of steps that nobody waits for; how many they are."""
        for _ in range(ARMS[self.name].steps):
            self._forward_of(self.model)().backward()
            self._forget()
        return ARMS[self.name].steps

    def report(self) -> Report:
        """Kept channels and shapes by layer."""
        return inspect(self.model)

    def peak_bytes(self) -> int:
        """Highest tensor memory of a step, over what lives before it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self()
        level = peak = 0
        events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            level += event.nbytes()
            peak = max(peak, level)
        return peak
