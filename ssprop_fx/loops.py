"""Which layers' sparse backward passes are computed by loops in C (:mod:`ssprop_fx.native`), and by which of them.

PyTorch has no operation that reads some channels of a tensor where they lie. What it does have takes as long for a few channels
as for many in some forms of layers, and longer where few channels are left in every group. The rules here are by shape, from
times of both on two cores with and without channels last (docs/performance.md).

For compiled graphs it is an operator, ``ssprop::kept_backward``, whose kernel decides again by the layouts that it sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native, operators
from .convolutions import ConvArgs, conv_backward_flops
from .dense import Gradients, asked_for
from .gather import channels_last

# Kept channels of a group times its inputs, of a 1×1 layer, up to which the loop is quicker than the library's products of
# matrices. With channels first so many and _MORE_FIRST for each position of the output, but up to _MOST_FIRST; strided layers,
# for which the library has no quick way, always up to _MOST_STRIDED.
_MOST = 192 * 1024
_FIRST, _MORE_FIRST, _MOST_FIRST, _MOST_STRIDED = 32 * 1024, 512, 128 * 1024, 448 * 1024

# Columns, which are kept channels of a group times the kernel's positions, up to which the loop is quicker than the library's
# convolution: in three dimensions or in groups; with channels last of inputs that only begin to fill vectors; otherwise. With
# channels last of more inputs it is columns times inputs that count, up to so many and _MORE_COLUMNS for each position of the
# input, but up to _MOST_COLUMNS.
_COLUMNS, _COLUMNS_THIN, _COLUMNS_PLAIN = 448, 40, 112
_FEWEST_COLUMNS, _MORE_COLUMNS, _MOST_COLUMNS = 32 * 1024, 768, 224 * 1024

# The same of strided layers, whose columns are those of the part of the input that most positions of the kernel read. With
# channels last, from _FEWEST_STRIDED inputs on, columns times inputs up to _FEWEST_COLUMNS and _MORE_STRIDED for each position
# of the output, but up to _MOST_STRIDED, and of fewer than 16 inputs also columns; with channels first both, in three
# dimensions more. Every part costs a start; with channels first and several dimensions its rows are scattered in memory, too.
_FEWEST_STRIDED = 8
_MORE_STRIDED, _STRIDED_THIN = 3072, 128
_STRIDED_FIRST, _STRIDED_FIRST_3D = 4 * 1024, 8 * 1024
_PARTS_LAST, _PARTS_ROW, _PARTS_FIRST = 64, 32, 8


def loop_backward(
    grad: Tensor, input: Tensor, weight: Tensor, index: Tensor, args: ConvArgs, mask: Sequence[bool], compiling: bool = False
) -> Gradients | None:
    """Gradients of a convolution from some of its output channels by a loop in C, where there is one that is quicker.

    Args:
        grad: gradient of the output, (N, K, *out).
        input: (N, C, *in).
        weight: (K, C/g, *kernel).
        index: (k,), the output channels: as many of every group, or of a depthwise convolution any.
        args: geometry of the convolution.
        mask: which of the gradients of input, weight and bias to compute.
        compiling: write an operator into the graph.

    Returns:
        The gradients of input, weight and bias, None where not asked for; or None where another way is to be taken.
    """
    here = grad.device.type == "cpu" and grad.dtype == torch.float32
    if not here or args.transposed or not 2 < input.dim() < 6 or weight.dim() != input.dim():
        return None
    loop = _loop(grad, input, weight, index.shape[0], args, mask)
    if loop is None:
        return None
    if operators.wanted(grad, compiling):
        geometry = list(args.stride), list(args.padding), list(args.dilation), args.groups
        return asked_for(_operator(grad, input, weight, index, *geometry, list(mask)), mask)
    if compiling or not native.serves(grad, input, weight):
        return None
    return loop(grad, input, weight, index, args, mask)


def _loop(
    grad: Tensor, input: Tensor, weight: Tensor, kept: int, args: ConvArgs, mask: Sequence[bool]
) -> Callable[..., Gradients | None] | None:
    inputs, taps = weight.shape[1], math.prod(weight.shape[2:])
    if inputs == 1 and args.groups > 1:  # depthwise
        return native.direct
    last = channels_last(input)
    if grad.shape[1] == args.groups > 1:  # whole groups are kept
        return native.direct if last and inputs <= 8 else None
    keep = kept // args.groups
    if taps == 1:
        return native.products if all(p == 0 for p in args.padding) and _few_channels(grad, weight, keep, args, last) else None
    if args.groups == 1 and not mask[0] and inputs <= 8:  # a network's first layer
        return native.stem if keep >= 8 or not last else None
    grouped, strided = args.groups > 1, any(s > 1 for s in args.stride)
    if grouped and last and inputs <= 8:
        return native.direct
    if grouped and not last and keep % 8 == 0:  # for other numbers the library has no quick way
        return None
    read = _all_read(grad, weight, args)
    if grouped and not last and inputs <= 16 and (strided or not read):
        return native.direct
    few = _few_strided_columns if strided else _few_columns
    return native.products if read and few(grad, input, weight, keep, args, last) else None


def _all_read(grad: Tensor, weight: Tensor, args: ConvArgs) -> bool:
    """Whether no position of the input that the loop works on is unread; what is not finite there must not be seen."""
    parts = zip(grad.shape[2:], weight.shape[2:], args.stride, args.dilation, strict=True)
    return all(d == 1 or k == 1 or (s == 1 and isinstance(size, int) and size >= d) for size, k, s, d in parts)


def _few_channels(grad: Tensor, weight: Tensor, keep: int, args: ConvArgs, last: bool) -> bool:
    products = keep * weight.shape[1]
    if last:
        return products <= _MOST
    if any(s > 1 for s in args.stride):
        return products <= _MOST_STRIDED
    return products <= _within(math.prod(grad.shape[2:]), _FIRST, _MORE_FIRST, _MOST_FIRST)


def _few_columns(grad: Tensor, input: Tensor, weight: Tensor, keep: int, args: ConvArgs, last: bool) -> bool:
    inputs, columns, solid = weight.shape[1], keep * math.prod(weight.shape[2:]), input.dim() == 5
    few = columns <= (_COLUMNS if solid or (args.groups > 1 and not last) else _COLUMNS_PLAIN)
    if last and inputs >= 32:
        positions = input.shape[0] * math.prod(input.shape[2:])
        most = _within(positions, _FEWEST_COLUMNS, _MORE_COLUMNS, _MOST_COLUMNS)
        return (few and solid) or columns * inputs <= most
    if last and not solid:  # a vector of inputs is mostly empty
        return columns <= _COLUMNS_THIN and inputs >= 16
    return few


def _few_strided_columns(grad: Tensor, input: Tensor, weight: Tensor, keep: int, args: ConvArgs, last: bool) -> bool:
    if not all(isinstance(s, int) for s in args.stride):  # a symbol must not be asked
        return False
    inputs, read = weight.shape[1], [-(-k // s) for k, s in zip(weight.shape[2:], args.stride, strict=True)]
    columns, parts = keep * math.prod(read), math.prod(args.stride)
    if parts > (_PARTS_LAST if last else _PARTS_ROW if input.dim() == 3 else _PARTS_FIRST):
        return False
    if last:
        most = _within(grad.shape[0] * math.prod(grad.shape[2:]), _FEWEST_COLUMNS, _MORE_STRIDED, _MOST_STRIDED)
        return inputs >= _FEWEST_STRIDED and columns * inputs <= most and (inputs >= 16 or columns <= _STRIDED_THIN)
    return columns <= _STRIDED_THIN and columns * inputs <= (_STRIDED_FIRST_3D if input.dim() == 5 else _STRIDED_FIRST)


def _within(positions: int, fewest: int, more: int, most: int) -> int:
    known = isinstance(positions, int)  # a symbol must not be asked
    return min(most, fewest + more * positions) if known else most


def _kept_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    index: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    mask: list[bool],
) -> tuple[Tensor, ...]:
    from .backward import kept_backward  # which comes here first

    args = ConvArgs(stride, padding, dilation, False, [0] * len(stride), groups)
    *grads, bias_grad = kept_backward(grad, input, weight, index, args, mask)
    return *operators.laid_out(grads, (input, weight)), grad.new_empty((0,)) if bias_grad is None else bias_grad


def _fake(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return operators.shaped((input, weight, grad.new_empty((grad.shape[1],))), rest[-1])


def kept_backward_flops(grad, input, weight, index, *rest, **_) -> int:
    """FLOPs of ``ssprop::kept_backward``, for ``torch.utils.flop_counter``."""
    mask = rest[-1] if rest else (True, True)
    return conv_backward_flops(grad, weight, outputs=mask[0] + mask[1]) * index[0] // grad[1]


_operator = operators.define(
    "kept_backward(Tensor grad, Tensor input, Tensor weight, Tensor index, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, SymInt groups, bool[] mask) -> (Tensor, Tensor, Tensor)",
    _kept_backward,
    _fake,
)
