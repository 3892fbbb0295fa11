"""Dropping over space, over channels and space together, or over the channels of each sample: by a mask, for analysis.

What is dropped is set to zero and the dense backward pass runs, so that nothing is saved. These exist to be compared with
whole channels, which are gathered: at the same share of the gradient, which choice trains better?
"""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import choices, importance, kept_channels

_OVER = " over "  # a ranking in a graph reads `l1`, or `l1 over space`


def ranking(criterion: str, drop_over: str) -> str:
    """Criterion and units as one word for graphs and reports; whole channels are not mentioned."""
    return criterion if drop_over == "channels" else f"{criterion}{_OVER}{drop_over}"


def is_masked(ranking: str) -> bool:
    """Whether the units that are ranked are not whole channels, and dropping them saves nothing."""
    return _OVER in ranking


def masked(grad: Tensor, output: Tensor | None, ranking: str, groups: int, keep: int, sliced: bool) -> Tensor:
    """``grad`` with its least important units set to zero.

    The share that is kept is the layer's ``keep`` of its :func:`~ssprop_fx.selection.choices`, whatever the units are:
    positions, shared by all channels and samples (``space``); elements of a sample, shared by the batch
    (``channels_space``); or channels of one sample (``channels_per_sample``; of each group, where there are groups). Of
    positions and elements the nearest whole number is kept, and at least one.

    Args:
        grad: (N, K, *spatial); for a linear layer (N, K).
        output: of grad's shape, for ``taylor``; else None.
        ranking: as :func:`ranking` makes it.
        sliced: see :func:`~ssprop_fx.selection.importance`.
    """
    criterion, _, over = ranking.partition(_OVER)
    samples, channels, *spatial = grad.shape
    whole = choices(channels, groups)
    if over == "channels_per_sample":
        choosers, count = samples * (channels // whole), keep
        if choosers == 0:  # no samples
            return grad
        shape = [samples, channels, *[1] * len(spatial)]
    else:
        shape = [1, 1 if over == "space" else channels, *spatial]
        units = 1
        for size in shape:
            units = units * size
        choosers, count = 1, max(1, (2 * units * keep + whole) // (2 * whole))
    with torch.no_grad():
        ranked = None if output is None else _units_second(output, over)
        score = importance(_units_second(grad, over), ranked, criterion, sliced)
        index = kept_channels(score, choosers, count)
        kept = torch.zeros_like(score, dtype=torch.bool).index_fill(0, index, True).view(shape)
    return torch.where(kept, grad, 0)  # not a product: what is dropped may be inf


def _units_second(tensor: Tensor, over: str) -> Tensor:
    """The tensor with its units along dimension 1, so that :func:`importance` scores them."""
    if over == "space":
        return tensor.flatten(2).transpose(1, 2)
    if over == "channels_space":
        return tensor.flatten(1)
    return tensor.flatten(0, 1).unsqueeze(0)
