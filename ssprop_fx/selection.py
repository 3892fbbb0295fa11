"""Which output channels to keep: importance by criterion, how many, and the channels themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import native, operators
from ._compat import functorch_active
from .gather import COMPARED, after

# |G| is summed in slices of this many elements: a slice and its absolute value stay in the cache, and no
# temporary of G's size is made. Up to twice as many are one slice.
_SLICE = 1 << 18

AUTO = 0  # `round_to: auto` where an operator argument has to be a whole number


def importance(grad: Tensor, output: Tensor | None, criterion: str, sliced: bool = True) -> Tensor:
    """Importance of each output channel, non-finite where the channel's gradient is.

    Args:
        grad: gradient of the convolution's output, (N, K, *spatial), any floating-point type.
        output: the convolution's output, of grad's shape; only ``taylor`` reads it.
        criterion: ``l1`` mean |G| (ssProp, arXiv 2408.12561), ``l2`` root of the sum of squares, ``taylor`` |Σ G·y|
            (Molchanov et al., arXiv 1906.10771), ``random`` uniform noise.
        sliced: sum slice by slice, which makes no temporary of grad's size; a compiler fuses better without.

    Returns:
        (K,), at least float32. Only its order has a meaning.
    """
    if criterion == "l1" and sliced and native.serves(grad) and (sums := native.abs_sum(grad)) is not None:
        return sums
    dtype = _score_dtype(grad)
    dims = [d for d in range(grad.dim()) if d != 1]
    if criterion in ("l1", "l2") and sliced and grad.device.type != "cpu":
        return norms(grad, int(criterion[1]))
    if criterion == "l1":
        return _sum(lambda g: g.abs().sum(dims, dtype=dtype), sliced, grad)
    if criterion == "l2":
        return _sum(lambda g: g.to(dtype).square().sum(dims), sliced, grad)
    if criterion == "taylor":
        assert output is not None
        return _sum(lambda g, y: (g.to(dtype) * y.to(dtype)).sum(dims), sliced, grad, output).abs()
    if criterion == "random":
        # x·0 is NaN where the sum is not finite, and NaN ranks first
        noise = torch.rand(grad.shape[1], dtype=dtype, device=grad.device)
        return noise + grad.sum(dims, dtype=dtype) * 0
    raise ValueError(f"unknown criterion {criterion!r}: expected l1, l2, taylor or random")


def norms(grad: Tensor, order: int) -> Tensor:
    """Sum of |G| or root of the sum of squares of each channel: (N, K, *spatial) → (K,), at least float32.

    On accelerators it is one pass without a temporary; on the CPU several times slower than ``abs`` and ``sum``.
    """
    dims = [d for d in range(grad.dim()) if d != 1]
    return torch.linalg.vector_norm(grad, order, dims, dtype=_score_dtype(grad))


def compiled_importance(grad: Tensor, output: Tensor | None, criterion: str, apart: bool = False) -> Tensor:
    """:func:`importance` as a fusing compiler runs it best: generated code; on the CPU for little data an operator.

    What a loop in C sums (:mod:`ssprop_fx.native`) is an operator whatever its size: there is nothing to compile. The
    compiler has random numbers of its own: ``random`` is left to it.

    Args:
        apart: the generated code is to be kept out of the kernel that writes the gradient.
    """
    size = grad.numel()  # one that is a symbol must not be asked, or is that of one size
    quick = criterion == "l1" and grad.dtype == torch.float32 and native.library is not None
    small = isinstance(size, int) and size <= 2 * _SLICE
    if (quick or small) and criterion != "random" and operators.wanted(grad, True):
        return _importance_operator(grad, output, criterion)
    return importance(after(grad) if apart else grad, output, criterion, sliced=False)


def _sum(summed: Callable[..., Tensor], sliced: bool, *tensors: Tensor) -> Tensor:
    """What ``summed`` makes of tensors (N, K, *spatial), (K,), slice by slice of the batch, or of one sample's space."""
    shape, size = tensors[0].shape, tensors[0].numel()
    dim = 0 if shape[0] > 1 else 2
    if not sliced or tensors[0].device.type != "cpu" or size <= 2 * _SLICE or len(shape) <= dim:
        return summed(*tensors)
    parts = zip(*(tensor.split(max(1, _SLICE * shape[dim] // size), dim) for tensor in tensors), strict=True)
    total = summed(*next(parts))
    for part in parts:
        total += summed(*part)
    return total


def _score_dtype(grad: Tensor) -> torch.dtype:
    return torch.float64 if grad.dtype == torch.float64 else torch.float32


def _importance_fake(grad: Tensor, output: Tensor | None, criterion: str) -> Tensor:
    return grad.new_empty((grad.shape[1],), dtype=_score_dtype(grad))


_importance_operator = operators.define(
    "importance(Tensor grad, Tensor? output, str criterion) -> Tensor", importance, _importance_fake
)


def kept_channels(score: Tensor, groups: int, keep: int, compiling: bool = False) -> Tensor:
    """Indices of the ``keep`` most important channels of each group, ascending within the group.

    Args:
        score: (K,); NaN and inf rank first, as ``topk`` orders them.
        groups: the number of groups that choose independently; K is a multiple of it.
        compiling: write what a fusing compiler runs best, on the CPU the operator ``ssprop::kept_channels``.

    Returns:
        (groups · keep,) indices into K.
    """
    if operators.wanted(score, compiling):
        return _kept_channels_operator(score, groups, keep)
    counts = compiling and not functorch_active() and score.numel() ** 2 // groups <= COMPARED
    return (_counted_channels if counts else _kept_channels)(score, groups, keep)


def _kept_channels(score: Tensor, groups: int, keep: int) -> Tensor:
    if native.serves(score):
        return native.kept_channels(score, groups, keep)
    per_group = score.shape[0] // groups
    index = score.view(groups, per_group).topk(keep, dim=1, sorted=False).indices.sort(dim=1).values
    if groups > 1:
        index = index + torch.arange(groups, device=score.device).unsqueeze(1) * per_group
    return index.reshape(-1)


def _counted_channels(score: Tensor, groups: int, keep: int) -> Tensor:
    """The same by counting how many channels are ahead of each: a compiler makes three small kernels of it.

    On an accelerator ``topk`` and ``sort`` are calls of the library's for each layer, which nothing can be fused with.
    """
    per_group = score.shape[0] // groups
    own = torch.where(score.isnan(), float("inf"), score).view(groups, per_group, 1)
    channel = torch.arange(per_group, device=score.device)
    before = channel < channel.unsqueeze(1)
    other = own.transpose(1, 2)
    kept = ((other > own) | ((other == own) & before)).sum(2) < keep
    place = (kept.unsqueeze(1) & before).sum(2)  # how many kept channels come before
    here = kept.unsqueeze(1) & (place.unsqueeze(1) == torch.arange(keep, device=score.device).unsqueeze(1))
    index = torch.where(here, channel, 0).sum(2)
    return (index + torch.arange(groups, device=score.device).unsqueeze(1) * per_group).reshape(-1)


def _kept_channels_fake(score: Tensor, groups: int, keep: int) -> Tensor:
    return score.new_empty((groups * keep,), dtype=torch.int64)


_kept_channels_operator = operators.define(
    "kept_channels(Tensor score, SymInt groups, SymInt keep) -> Tensor", _kept_channels, _kept_channels_fake
)


def choices(out_channels: int, groups: int) -> int:
    """How many channels one choice is made from: K/g, or all the groups where a group has a single channel."""
    per_group = out_channels // groups
    return groups if per_group == 1 else per_group


def keep_count(drop_rate: float, channels: int, round_to: int = 1) -> int:
    """Number of kept channels out of ``channels``: (1 − drop_rate)·channels rounded to ``round_to``, at least 1.

    ``round_to`` 1 rounds down, which is the paper's ``max(int(keep · K), 1)``; larger ones go to the nearest
    multiple. The small constant keeps (1 − 0.8)·10 at 2 in floating point.
    """
    if drop_rate <= 0:
        return channels
    wanted = (1.0 - drop_rate) * channels
    count = int(wanted + 1e-6) if round_to == 1 else round_to * int(wanted / round_to + 0.5 + 1e-9)
    return min(max(count, 1), channels)


@dataclass(frozen=True)
class Demand:
    """What one layer asks of the budget: its choice of channels, and what the backward pass costs.

    ``calls``, where they are needed, are what a measurement of the layer has to repeat: each :class:`ssprop_fx.cost.Call` of
    a step, next to the settings that its time depends on.
    """

    layer: str
    channels: int
    flops: int
    drop_rate: float
    granule: int = 16
    round_to: int = AUTO
    calls: tuple[Any, ...] = ()
    criterion: str = "l1"
    gradients: str = "all"


def fast_granule(dtype: torch.dtype, device: torch.device | None = None) -> int:
    """Channel counts that are multiples of this run fast: a vector register (CPU) or a tensor-core tile (GPU)."""
    if device is not None and device.type == "cuda":
        return 8 if dtype == torch.float32 else 16
    return 32 if dtype in (torch.bfloat16, torch.float16) else 16


def plan_counts(demands: Sequence[Demand], tolerance: float = 0.02) -> dict[str, int]:
    """``round_to: auto``: a fast count for each layer, the network's FLOPs within ``tolerance`` of what was asked.

    Each layer goes to the nearest multiple of its granule; then, while the total is off, the layer whose move to the
    other neighbour helps most moves; what multiples cannot balance, exact counts do, largest layers first.

    Args:
        demands: the layers, in any order; the result depends on the order only in ties.
        tolerance: allowed share of the asked backward FLOPs, both ways.
    """
    wanted = {d.layer: (1.0 - d.drop_rate) * d.channels for d in demands}
    unit = {d.layer: d.flops / d.channels for d in demands}
    asked = sum(unit[d.layer] * wanted[d.layer] for d in demands)
    options: dict[str, list[int]] = {}
    count: dict[str, int] = {}
    for d in demands:
        low = int(wanted[d.layer] / d.granule + 1e-9) * d.granule
        near = {min(max(c, 1), d.channels) for c in (low, low + d.granule) if c > 0}
        if d.drop_rate <= 0:
            near = {d.channels}
        elif d.channels < 2 * d.granule:
            near = {keep_count(d.drop_rate, d.channels)}
        options[d.layer] = sorted(near)
        count[d.layer] = min(near, key=lambda c, layer=d.layer: (abs(c - wanted[layer]), c))  # type: ignore[misc]

    def error(layer: str, c: int) -> float:
        return unit[layer] * (c - wanted[layer])

    off = sum(error(d.layer, count[d.layer]) for d in demands)
    off = _improve(off, options, count, error, tolerance * asked)
    if abs(off) > tolerance * asked:
        for d in sorted(demands, key=lambda d: -abs(error(d.layer, count[d.layer]))):
            if abs(off) <= tolerance * asked:
                break
            exact = min(max(round(wanted[d.layer]), 1), d.channels)
            off += error(d.layer, exact) - error(d.layer, count[d.layer])
            count[d.layer] = exact
            options[d.layer] = _nearest(wanted[d.layer], d.channels)
        off = _improve(off, options, count, error, tolerance * asked)  # many layers of few channels, all rounded one way
    for further in range(3):  # no single layer's move helps, but those of several together may
        if abs(off) <= tolerance * asked:
            break
        for d in demands:
            around = _nearest(wanted[d.layer], d.channels, further if d.drop_rate > 0 else 0)
            options[d.layer] = sorted({count[d.layer], *around})
        ends = [sum(error(layer, end(choice)) for layer, choice in options.items()) for end in (min, max)]
        if ends[0] <= tolerance * asked and ends[1] >= -tolerance * asked:
            other = _balanced(sorted(demands, key=lambda d: -unit[d.layer]), options, error, tolerance * asked)
            new = sum(error(layer, c) for layer, c in other.items())
            count, off = (other, new) if abs(new) < abs(off) else (count, off)
    return count


def _nearest(wanted: float, channels: int, further: int = 0) -> list[int]:
    """The whole numbers next to ``wanted``, below and above, and as many ``further`` away."""
    low = int(wanted + 1e-6)
    return [c for c in range(low - further, low + 2 + further) if 1 <= c <= channels]


def _balanced(
    demands: Sequence[Demand], options: Mapping[str, list[int]], error: Callable[[str, int], float], allowed: float
) -> dict[str, int]:
    """Counts out of ``options`` whose errors sum up to what is allowed, as near to each layer's own share as can be.

    Layer by layer the sums so far are carried on: of those that are as good as equal one, and in all 512, those that the
    layers to come can best make up for. Up to nine layers of two options that is every combination.
    """
    errors = [[error(d.layer, c) for c in options[d.layer]] for d in demands]
    to_come = sum((min(e) + max(e)) / 2 for e in errors)
    sums: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]  # off, shares off in all, counts
    for d, of_layer in zip(demands, errors, strict=True):
        to_come -= (min(of_layer) + max(of_layer)) / 2
        found: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for off, shares, counts in sums:
            for c, e in zip(options[d.layer], of_layer, strict=True):
                new = (off + e, shares + abs(e) / max(d.flops, 1), (*counts, c))
                bucket = round(new[0] / allowed * 256)
                if bucket not in found or new[1] < found[bucket][1]:
                    found[bucket] = new
        sums = sorted(found.values(), key=lambda item: abs(item[0] + to_come))[:512]
    good = [item for item in sums if abs(item[0]) <= allowed]
    best = min(good, key=lambda item: item[1]) if good else min(sums, key=lambda item: abs(item[0]))
    return dict(zip((d.layer for d in demands), best[2], strict=True))


def _improve(off, options: Mapping[str, list[int]], count: dict[str, int], error, allowed: float) -> float:
    for _ in range(2 * len(count)):
        if abs(off) <= allowed:
            break
        best = None
        for layer, candidates in options.items():
            for c in candidates:
                moved = off + error(layer, c) - error(layer, count[layer])
                if abs(moved) < abs(off) - 1e-9 and (best is None or abs(moved) < abs(best[2])):
                    best = (layer, c, moved)
        if best is None:
            break
        count[best[0]], off = best[1], best[2]
    return off
