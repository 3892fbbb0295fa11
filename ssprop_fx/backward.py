"""The sparse backward pass of a convolution, in plain tensor operations.

One function serves eager mode (as it stands, differentiable), the operator's kernel, and the compiler, which traces it
into the graph. The gradients are exactly those of the dense backward pass with every dropped channel of the output's
gradient set to zero; the dropped channels are gathered away, never multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._compat import gradient_format
from .convolutions import ConvArgs
from .dense import Gradients, dense_backward
from .depthwise import groups_backward
from .gather import spread, take
from .loops import loop_backward
from .masking import is_masked, masked
from .pointwise import is_pointwise, pointwise_backward
from .selection import choices, compiled_importance, importance, kept_channels


def sparse_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    args: ConvArgs,
    mask: Sequence[bool],
    keep: int,
    criterion: str,
    gradients: str = "all",
    compiling: bool = False,
    apart: bool = False,
) -> Gradients:
    """Gradients of a convolution from its ``keep`` most important output channels.

    Args:
        grad: gradient of the output, (N, K, *out).
        input: (N, C, *in).
        weight: (K, C/g, *kernel), or (C, K/g, *kernel) when transposed.
        output: the convolution's output, (N, K, *out), for the criterion ``taylor``; else None.
        args: geometry of the convolution.
        mask: which of the gradients of input, weight and bias to compute.
        keep: channels to keep in each group; where a group has a single channel (depthwise), groups to keep.
        criterion: see :func:`ssprop_fx.selection.importance`; or a ranking of other units, :mod:`ssprop_fx.masking`.
        gradients: ``all``, or ``weight`` to leave the input's gradient dense.
        compiling: write what a fusing compiler runs best instead of what eager mode does.
        apart: keep the channels' importance out of the kernels that a compiler writes the gradients in.

    Returns:
        The gradients of input, weight and bias, None where not asked for.
    """
    if weight.dim() == 2 and grad.dim() != 2:
        flat_grad, flat_input = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
        flat_output = None if output is None else output.reshape(-1, output.shape[-1])
        grads = sparse_backward(flat_grad, flat_input, weight, flat_output, args, mask, keep, criterion, gradients, compiling)
        return grads[0] if grads[0] is None else grads[0].reshape(input.shape), grads[1], grads[2]
    channels, groups = grad.shape[1], args.groups
    if keep >= choices(channels, groups):
        return dense_backward(grad, input, weight, args, mask)
    dense_input = gradients == "weight" and mask[0]
    input_grad = dense_backward(grad, input, weight, args, (True, False, False))[0] if dense_input else None
    mask = (mask[0] and not dense_input, mask[1], mask[2])
    if not any(mask):
        return input_grad, None, None
    if is_masked(criterion):
        kept = masked(grad, output, criterion, groups, keep, sliced=not compiling)
        masked_grads = dense_backward(kept, input, weight, args, mask)
        return input_grad if dense_input else masked_grads[0], *masked_grads[1:]

    whole_groups = channels == groups
    with torch.no_grad():
        score = compiled_importance(grad, output, criterion, apart) if compiling else importance(grad, output, criterion)
        index = kept_channels(score, 1 if whole_groups else groups, keep, compiling)
    grads = kept_backward(grad, input, weight, index, args, mask, compiling)
    return input_grad if dense_input else _laid_out(grads[0], input, weight, args, compiling), *grads[1:]


def kept_backward(
    grad: Tensor, input: Tensor, weight: Tensor, index: Tensor, args: ConvArgs, mask: Sequence[bool], compiling: bool = False
) -> Gradients:
    """Gradients of a convolution from some of its output channels, in whichever way is quickest.

    Args:
        grad, input, weight, args, mask, compiling: as in :func:`sparse_backward`.
        index: (k,), the output channels, ascending: as many of every group, or whole groups of one channel each.

    Returns:
        The gradients of input, weight and bias, None where not asked for.
    """
    grads = loop_backward(grad, input, weight, index, args, mask, compiling)
    if grads is not None:
        return grads
    if grad.shape[1] == args.groups:
        return groups_backward(grad, input, weight, index, args, mask, compiling)
    if is_pointwise(input, weight, args):
        return pointwise_backward(grad, input, weight, index, args, mask, compiling)
    kept_grad, kept_weight = take(grad, 1, index, compiling), _take_weight(weight, index, args, compiling)
    gi, gw, _ = dense_backward(kept_grad, input, kept_weight, args, (mask[0], mask[1], False))
    gw = _spread_weight(gw, weight, index, args, compiling) if gw is not None else None
    gb = None
    if mask[2]:
        total = kept_grad.sum([d for d in range(grad.dim()) if d != 1])
        gb = spread(total, 0, index, grad.new_empty(grad.shape[1]), compiling)
    return gi, gw, gb


def _laid_out(input_grad: Tensor | None, input: Tensor, weight: Tensor, args: ConvArgs, compiling: bool) -> Tensor | None:
    """In eager mode, in the format of the dense one: PyTorch's instance_norm, for one, has a wrong backward for another."""
    if input_grad is None or compiling or weight.dim() == 2 or all(t.is_contiguous() for t in (input_grad, input, weight)):
        return input_grad
    return input_grad.contiguous(memory_format=gradient_format(input, weight, args))


def _take_weight(weight: Tensor, index: Tensor, args: ConvArgs, compiling: bool) -> Tensor:
    if not args.transposed:
        return take(weight, 0, index, compiling)
    if args.groups == 1:
        return take(weight, 1, index, compiling)
    flat = _outputs_first(weight, args.groups)
    return _inputs_first(take(flat, 0, index, compiling), args.groups)


def _spread_weight(values: Tensor, weight: Tensor, index: Tensor, args: ConvArgs, compiling: bool) -> Tensor:
    if not args.transposed:
        return spread(values, 0, index, weight, compiling)
    if args.groups == 1:
        return spread(values, 1, index, weight, compiling)
    flat = _outputs_first(weight, args.groups)
    return _inputs_first(spread(_outputs_first(values, args.groups), 0, index, flat, compiling), args.groups)


def _outputs_first(weight: Tensor, groups: int) -> Tensor:
    """(C, K/g, *kernel) → (K, C/g, *kernel)"""
    c, k, *kernel = weight.shape
    return weight.reshape(groups, c // groups, k, *kernel).transpose(1, 2).reshape(groups * k, c // groups, *kernel)


def _inputs_first(weight: Tensor, groups: int) -> Tensor:
    """(K, C/g, *kernel) → (C, K/g, *kernel)"""
    k, c, *kernel = weight.shape
    return weight.reshape(groups, k // groups, c, *kernel).transpose(1, 2).reshape(groups * c, k // groups, *kernel)
