"""The sparse backward pass where every group has a single output channel: whole groups are kept, and dropped.

Of a depthwise convolution one pass of the library over memory costs as much as its backward pass, so that gathering channels
alone takes longer than can be saved. On the CPU a loop of our own (:mod:`ssprop_fx.native`) reads the kept channels where
they lie; for compiled graphs it is an operator, ``ssprop::depthwise``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native, operators
from .convolutions import ConvArgs, conv_backward_flops
from .dense import Gradients, asked_for, dense_backward
from .gather import spread, take


def groups_backward(
    grad: Tensor, input: Tensor, weight: Tensor, index: Tensor, args: ConvArgs, mask: Sequence[bool], compiling: bool = False
) -> Gradients:
    """Gradients of a convolution of one output channel a group from some of its groups.

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
    plain = not args.transposed and input.shape[1] == args.groups and 2 < input.dim() < 6
    if plain and grad.dtype == torch.float32 and operators.wanted(grad, compiling):
        geometry = list(args.stride), list(args.padding), list(args.dilation)
        grads = _operator(grad, input, weight, index, *geometry, list(mask))
        return asked_for(grads, mask)
    if plain and not compiling and native.serves(grad, input, weight):
        found = native.depthwise(grad, input, weight, index, args, mask[0])
        if found is not None:
            return asked_for(found, mask)
    return _gathered(grad, input, weight, index, args, mask, compiling)


def _gathered(
    grad: Tensor, input: Tensor, weight: Tensor, index: Tensor, args: ConvArgs, mask: Sequence[bool], compiling: bool
) -> Gradients:
    """The library's backward pass of the convolution that only the kept groups make."""
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


def _depthwise(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    index: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mask: list[bool],
) -> tuple[Tensor, ...]:
    args = ConvArgs(stride, padding, dilation, False, [0] * len(stride), grad.shape[1])
    grads = groups_backward(grad, input, weight, index, args, mask)
    return operators.laid_out(grads, _fake(grad, input, weight, index, stride, padding, dilation, mask))


def _fake(grad, input, weight, index, stride, padding, dilation, mask) -> tuple[Tensor, ...]:
    return operators.shaped((input, weight, grad.new_empty((grad.shape[1],))), mask)


def depthwise_flops(grad, input, weight, index, *rest, **_) -> int:
    """FLOPs of ``ssprop::depthwise``, for ``torch.utils.flop_counter``."""
    mask = rest[-1] if rest else (True, True)
    return conv_backward_flops(grad, weight, outputs=mask[0] + mask[1]) * index[0] // grad[1]


_operator = operators.define(
    "depthwise(Tensor grad, Tensor input, Tensor weight, Tensor index, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "bool[] mask) -> (Tensor, Tensor, Tensor)",
    _depthwise,
    _fake,
)
