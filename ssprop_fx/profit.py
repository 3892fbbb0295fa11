"""Whether dropping channels pays: a convolution's backward pass, dense and sparse, timed on this machine.

A figure is measured once for a shape, type, layout and device, and kept in a file, so that later runs decide as earlier ones
did. ``profitable: auto`` asks for it while a model trains, ``ssprop-fx tune`` writes what it found into a policy.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import native
from .backward import dense_backward, sparse_backward
from .cost import Call
from .files import write_json
from .masking import is_masked
from .selection import AUTO, Demand, keep_count, plan_counts
from .timing import accelerator, processor, take_turns, timed

logger = logging.getLogger(__name__)

MARGIN = 0.97  # the sparse pass has to be below this share of the dense one; less is within the noise of a measurement
_ROUNDS, _SECONDS = 15, 0.3
_QUEUED = 10  # calls that an accelerator gets at once


@dataclass(frozen=True)
class Timing:
    """Median seconds of a backward pass, dense and with ``keep`` channels kept; of several ``calls``, all of them together."""

    keep: int
    dense: float
    sparse: float
    calls: int = 1

    @property
    def pays(self) -> bool:
        """Whether the sparse pass is quicker by more than noise."""
        return self.sparse < MARGIN * self.dense

    def __str__(self) -> str:
        several = f", {self.calls} calls" if self.calls > 1 else ""
        return f"{self.sparse * 1e3:.3g} ms sparse against {self.dense * 1e3:.3g} ms dense{several}"


def measure(call: Call, keeps: Sequence[int], criterion: str = "l1", gradients: str = "all") -> list[Timing]:
    """Time the backward pass of a convolution, dense and with each of ``keeps`` kept channels.

    Figures that are known are not measured again. The random state is left as it was. Without a bias: its gradient costs
    the same whatever is kept, next to nothing.

    Raises:
        RuntimeError: as PyTorch does, for one when memory runs out.
    """
    store = _store()
    names = {keep: _name(call, keep, criterion, gradients) for keep in keeps}
    missing = [keep for keep, name in names.items() if name not in store]
    if missing:
        with torch.no_grad(), torch.random.fork_rng(devices=[] if call.device == "cpu" else None):
            grad, input, weight = (random_tensor(call, sizes) for sizes in (call.output, call.input, call.weight))
            mask = (*(call.needs or (True, True)), False)
            output = grad if criterion.startswith("taylor") else None
            calls: dict[str, Any] = {"dense": lambda: dense_backward(grad, input, weight, call.args, mask)}
            for keep in missing:
                calls[str(keep)] = functools.partial(
                    sparse_backward, grad, input, weight, output, call.args, mask, keep, criterion, gradients
                )
            # waited for one by one, calls on a device would cost their launches and the waiting, which training hides
            figure = functools.partial(timed, repeats=1 if call.device == "cpu" else _QUEUED)
            taken = take_turns(calls, _ROUNDS, 2, _SECONDS * len(calls), figure=figure)
            times = {name: statistics.median(each) for name, each in taken.items()}
        for keep in missing:
            store[names[keep]] = [times["dense"], times[str(keep)]]
        _write(store)
    return [Timing(keep, *store[names[keep]]) for keep in keeps]


def measure_together(
    calls: Mapping[Call, int], keeps: Sequence[int], criterion: str = "l1", gradients: str = "all"
) -> list[Timing]:
    """:func:`measure` for all calls of a layer in a step, each with how often it is made: a head runs at several sizes."""
    each = [(times, measure(call, keeps, criterion, gradients)) for call, times in calls.items()]

    def total(i: int, keep: int) -> Timing:
        dense, sparse = (sum(n * getattr(timings[i], which) for n, timings in each) for which in ("dense", "sparse"))
        return Timing(keep, dense, sparse, sum(calls.values()))

    return [total(i, keep) for i, keep in enumerate(keeps)]


def settle(demands: Sequence[Demand], measured: bool) -> tuple[dict[str, int], dict[str, Timing]]:
    """How many channels each layer keeps, by ``round_to`` and, if ``measured``, only where it pays.

    A layer that stays dense because it does not pay has no part in the network's rounding budget.

    Returns:
        Layer → count, in the order of ``demands``; layer → measurement, of the layers that do not pay.
    """
    counts = _rounded(demands)
    losses: dict[str, Timing] = {}
    for _ in range(2 if measured else 0):  # twice, since leaving layers out moves the counts of others
        new = {d.layer: loss for d in demands if d.layer not in losses and (loss := _loss(d, counts[d.layer]))}
        losses |= new
        counts |= _rounded([d for d in demands if d.layer not in losses]) | {
            d.layer: d.channels for d in demands if d.layer in losses
        }
    return counts, losses


def _rounded(demands: Sequence[Demand]) -> dict[str, int]:
    planned = plan_counts([d for d in demands if d.round_to == AUTO])
    return {
        d.layer: planned[d.layer] if d.round_to == AUTO else keep_count(d.drop_rate, d.channels, d.round_to) for d in demands
    }


def _loss(demand: Demand, keep: int) -> Timing | None:
    """The measurement if keeping ``keep`` channels does not pay; None if it does, or if it cannot be told."""
    if keep >= demand.channels or is_masked(demand.criterion):
        return None
    try:
        calls = Counter(call for call in demand.calls if call.channels == demand.channels)
        timing = measure_together(calls, [keep], demand.criterion, demand.gradients)[0]
    except RuntimeError as problem:  # a large layer need not fit into memory twice
        logger.warning("%s could not be timed: %s", demand.layer, problem)
        return None
    return None if timing.pays else timing


def random_tensor(call: Call, sizes: Sequence[int]) -> Tensor:
    """Normal random numbers of a size, and of the call's type, device and layout."""
    tensor = torch.randn(tuple(sizes), device=call.device).to(call.dtype)
    if call.channels_last and tensor.dim() > 2:
        tensor = tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor


def _name(call: Call, keep: int, criterion: str, gradients: str) -> str:
    """The measurement as text."""
    a = call.args
    parts: list[Any] = [call.input, call.weight, call.output, a.stride, a.padding, a.dilation, a.transposed, a.groups]
    parts += [call.needs, call.dtype, call.device, "last" if call.channels_last else "first", keep, criterion, gradients]
    if call.device == "cpu":
        parts.append(torch.get_num_threads())
    else:
        parts += accelerator(torch.device(call.device)).values()
    return " ".join(str(part).replace(" ", "") for part in parts)


# --- the file -----------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where measurements are kept: ``$SSPROP_CACHE``, or ``ssprop-fx`` in the user's cache folder."""
    own = os.environ.get("SSPROP_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ssprop-fx"


@functools.cache
def _machine() -> str:
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    loops = "" if native.library is None else f" loops in C {native.VERSION}"
    return f"{platform.machine()} {processor()} {accelerator} {torch.__version__}{loops}"


def _path() -> Path:
    return folder() / f"timings-{hashlib.sha256(_machine().encode()).hexdigest()[:16]}.json"


@functools.cache
def _loaded(path: Path) -> dict[str, Any]:
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found["seconds"] if isinstance(found, dict) and isinstance(found.get("seconds"), dict) else {}


def _store() -> dict[str, Any]:
    return _loaded(_path())


def _write(store: dict[str, Any]) -> None:
    try:
        for name, seconds in _read(_path()).items():  # other processes may have measured since
            store.setdefault(name, seconds)
        write_json(_path(), {"machine": _machine(), "seconds": store})
    except OSError as problem:
        logger.info("timings are not kept: %s", problem)
