"""The sparse backward pass where every group has a single output channel: whole groups are kept, and dropped.

Of a depthwise convolution one pass of the library over memory costs as much as its backward pass, so that gathering channels
alone takes longer than can be saved: where there is one, a loop of our own comes first (:mod:`ssprop_fx.loops`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .convolutions import ConvArgs
from .dense import Gradients, dense_backward
from .gather import spread, take


def groups_backward(
    grad: Tensor, input: Tensor, weight: Tensor, index: Tensor, args: ConvArgs, mask: Sequence[bool], compiling: bool = False
) -> Gradients:
    """Gradients of a convolution of one output channel a group from some of its groups, by the library.

    Args:
        grad: gradient of the output, (N, g, *out).
        input: (N, C, *in).
        weight: (g, C/g, *kernel), or (C, 1, *kernel) when transposed.
        index: (k,), the groups.
        args: geometry of the convolution.
        mask: which of the gradients of input, weight and bias to compute.
        compiling: write what a fusing compiler runs best instead of what eager mode does.

    Returns:
        The gradients of input, weight and bias, None where not asked for; those of other groups are zeros.
    """
    picked = index
    if index.shape[0] == 1 and grad.device.type == "cpu":
        # The library's weight gradient of one group of few channels, under a tall kernel, writes past its end; that of two
        # equal groups does not, and a model whose layer has many must not come to be at its mercy by losing all but one.
        picked = index.repeat(2)
    rows = _input_channels(picked, input.shape[1] // args.groups)
    kept_grad, kept_input = take(grad, 1, picked, compiling), take(input, 1, rows, compiling)
    along = rows if args.transposed else picked
    kept_weight, kept_args = take(weight, 0, along, compiling), args._replace(groups=picked.shape[0])
    gi, gw, _ = dense_backward(kept_grad, kept_input, kept_weight, kept_args, (mask[0], mask[1], False))
    if picked is not index:
        rows, kept_grad = rows[: rows.shape[0] // 2], kept_grad[:, :1]
        along = rows if args.transposed else index
        gi, gw = None if gi is None else gi[:, : rows.shape[0]], None if gw is None else gw[: gw.shape[0] // 2]
    gi = None if gi is None else spread(gi, 1, rows, input, compiling)
    gw = None if gw is None else spread(gw, 0, along, weight, compiling)
    gb = None
    if mask[2]:
        total = kept_grad.sum([d for d in range(grad.dim()) if d != 1])
        gb = spread(total, 0, index, grad.new_empty(grad.shape[1]), compiling)
    return gi, gw, gb


def _input_channels(groups: Tensor, per_group: int) -> Tensor:
    if per_group == 1:
        return groups
    return (groups.unsqueeze(1) * per_group + torch.arange(per_group, device=groups.device)).flatten()
