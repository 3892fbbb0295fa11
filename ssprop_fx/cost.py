"""What one call of a convolution costs in the backward pass: dense, and with some of its channels kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ._compat import vmapped_samples
from .convolutions import ConvArgs, conv_backward_flops, output_channels
from .selection import AUTO, Demand, choices, fast_granule


@dataclass(frozen=True)
class Call:
    """One call of a convolution, as a step makes it.

    Attributes:
        input: shape, (N, C, *spatial).
        weight: shape, (K, C/g, *kernel), or (C, K/g, *kernel) when transposed.
        output: shape, (N, K, *spatial).
        args: geometry.
        needs: whether the gradients of the input and of the weight are computed; None where no gradient was recorded.
        dtype: of the output.
        device: its type, ``cpu``.
        channels_last: whether the input's channels are innermost in memory.
        samples: of ``vmap``, which the call is made for at once; each has these shapes and a choice of its own.
    """

    input: tuple[int, ...]
    weight: tuple[int, ...]
    output: tuple[int, ...]
    args: ConvArgs
    needs: tuple[bool, bool] | None
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    channels_last: bool = False
    samples: int = 1

    @classmethod
    def of(cls, input: Tensor, weight: Tensor, output: Tensor, args: ConvArgs, needs: tuple[bool, bool] | None = None) -> Call:
        """The call of batched tensors, real or fake; symbolic sizes count as what they were when traced."""
        sizes = _sizes(input)
        return cls(
            sizes, _sizes(weight), _sizes(output), args, needs, output.dtype, output.device.type,
            len(sizes) > 2 and sizes[1] > 1 and input.stride(1) == 1, vmapped_samples(output),
        )  # fmt: skip

    @property
    def channels(self) -> int:
        """How many channels (whole groups, if depthwise) one choice is made from."""
        return choices(output_channels(self.weight, self.args), int(self.args.groups))

    @property
    def granule(self) -> int:
        """Channel counts that are multiples of it run fast."""
        return fast_granule(self.dtype, torch.device(self.device))

    def flops(self, keep: int | None = None, gradients: str = "all") -> int:
        """FLOPs of the gradients that are computed, a multiply-add counted as two.

        Args:
            keep: channels kept of :attr:`channels`; None for the dense backward.
            gradients: ``all``, or ``weight`` if the input's gradient stays dense.
        """
        input, weight = self.needs or (True, True)
        one = self._gradient(1)
        kept = one if keep is None else one * keep // self.channels
        return input * (one if gradients == "weight" else kept) + weight * kept

    def forward_flops(self) -> int:
        """FLOPs of the call itself, a multiply-add counted as two."""
        return self._gradient(1)

    def grad_bytes(self, keep: int | None = None, gradients: str = "all") -> int:
        """Memory of the output's gradient that the backward products read.

        Args:
            keep: channels kept of :attr:`channels`; None for the dense backward.
            gradients: ``all``, or ``weight`` if the input's gradient stays dense, for which all of it is read.
        """
        needs = self.needs or (True, True)
        dense = self.samples * prod(self.output) * self.dtype.itemsize if any(needs) else 0
        return dense if keep is None or (gradients == "weight" and needs[0]) else dense * keep // self.channels

    def demand(
        self, layer: str, drop_rate: float, round_to: int = AUTO, criterion: str = "l1", gradients: str = "all"
    ) -> Demand:
        """What the call asks of the rounding budget, as a forward announces it: the FLOPs that the kept channels change."""
        input, weight = self.needs or (True, True)
        flops = self._gradient((input and gradients == "all") + weight)
        return Demand(layer, self.channels, flops, drop_rate, self.granule, round_to, (self,), criterion, gradients)

    def _gradient(self, outputs: int) -> int:
        positions = self.input if self.args.transposed else self.output
        return self.samples * conv_backward_flops(positions, self.weight, outputs)


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    return tuple(as_number(size) for size in tensor.shape)


_actual: ContextVar[Mapping[Any, int] | None] = ContextVar("sizes of a step", default=None)


@contextlib.contextmanager
def sizes_of_a_step(symbols: Mapping[Any, int]) -> Iterator[None]:
    """Inside, :func:`as_number` says what symbolic sizes are for these values of their symbols."""
    token = _actual.set(symbols)
    try:
        yield
    finally:
        _actual.reset(token)


def as_number(size: Any) -> int:
    """A size as a number: what a symbolic size was when the graph was traced, or inside of :func:`sizes_of_a_step`."""
    node = getattr(size, "node", None)
    if node is None:
        return int(size)
    symbols = _actual.get()
    if symbols and hasattr(node.expr, "xreplace"):
        value = node.expr.xreplace(symbols)
        if getattr(value, "is_number", True):
            return int(value)
    return int(node.hint)


def is_number(size: Any) -> bool:
    """Whether a size is the same number for all inputs of a graph."""
    node = getattr(size, "node", None)
    return node is None or not getattr(node.expr, "free_symbols", None)


def total_bytes(calls: Sequence[Call], keep: Sequence[int] | None = None, gradients: str = "all") -> int:
    """Memory of the output gradients that a layer's calls of a step read; ``keep`` has one entry per call."""
    return sum(c.grad_bytes(None if keep is None else keep[i], gradients) for i, c in enumerate(calls))


def total_flops(calls: Sequence[Call], keep: Sequence[int] | None = None, gradients: str = "all") -> int:
    """FLOPs of a layer's calls of a step; ``keep`` has one entry per call."""
    return sum(c.flops(None if keep is None else keep[i], gradients) for i, c in enumerate(calls))
