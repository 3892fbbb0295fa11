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
from .gather import between_zeros, channels_last, spread, take
from .masking import is_masked, masked
from .products import product_of_columns
from .selection import choices, compiled_importance, importance, kept_channels

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def dense_backward(grad: Tensor, input: Tensor, weight: Tensor, args: ConvArgs, mask: Sequence[bool]) -> Gradients:
    """``aten.convolution_backward``. Shapes as in :func:`sparse_backward`."""
    if not any(mask):
        return None, None, None
    if weight.dim() == 2:
        return _linear_backward(grad, input, weight, mask)
    bias_sizes = [grad.shape[1]] if mask[2] else None
    grads = torch.ops.aten.convolution_backward.default(grad, input, weight, bias_sizes, *_lists(args), list(mask))
    return grads[0] if mask[0] else None, grads[1] if mask[1] else None, grads[2] if mask[2] else None


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
    picked = index
    if whole_groups and keep == 1 and grad.device.type == "cpu":
        # The library's weight gradient of one group of few channels, under a tall kernel, writes past its end; that of two
        # equal groups does not, and a model whose layer has many must not come to be at its mercy by losing all but one.
        picked = index.repeat(2)
    kept_grad = take(grad, 1, picked, compiling)
    rows = _input_channels(picked, input.shape[1] // groups) if whole_groups else None
    kept_input = input if rows is None else take(input, 1, rows, compiling)
    kept_weight = _take_weight(weight, picked, rows, args, compiling)
    kept_args = args._replace(groups=picked.shape[0]) if whole_groups else args
    kept_mask = (mask[0], mask[1], False)
    if _is_matrix_product(kept_input, kept_weight, kept_args):
        gi, gw, _ = _pointwise_backward(kept_grad, kept_input, kept_weight, kept_args, kept_mask, compiling)
    else:
        gi, gw, _ = dense_backward(kept_grad, kept_input, kept_weight, kept_args, kept_mask)
    if rows is not None and picked is not index:
        rows, kept_grad = rows[: rows.shape[0] // 2], kept_grad[:, :1]
        gi, gw = None if gi is None else gi[:, : rows.shape[0]], None if gw is None else gw[: gw.shape[0] // 2]

    if mask[0]:
        assert gi is not None
        input_grad = gi if rows is None else spread(gi, 1, rows, input, compiling)
        if not compiling and weight.dim() > 2 and not all(t.is_contiguous() for t in (input_grad, input, weight)):
            # as the dense one: PyTorch's instance_norm, for one, has a wrong backward for a gradient in another format
            input_grad = input_grad.contiguous(memory_format=gradient_format(input, weight, args))
    weight_grad = _spread_weight(gw, weight, index, rows, args, compiling) if gw is not None else None
    bias_grad = None
    if mask[2]:
        total = kept_grad.sum([d for d in range(grad.dim()) if d != 1])
        bias_grad = spread(total, 0, index, grad.new_empty(channels), compiling)
    return input_grad, weight_grad, bias_grad


def _linear_backward(grad: Tensor, input: Tensor, weight: Tensor, mask: Sequence[bool]) -> Gradients:
    """A linear layer's backward, (*batch, K) and (*batch, C), in the products that autograd takes."""
    rows, values = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
    gi = (rows @ weight).reshape(input.shape) if mask[0] else None
    gw = rows.t() @ values if mask[1] else None
    return gi, gw, rows.sum(0) if mask[2] else None


def _is_matrix_product(input: Tensor, weight: Tensor, args: ConvArgs) -> bool:
    """A 1×1 convolution, strided or not, over channels-last data; or one that the library must not compute."""
    pointwise = (
        weight.dim() > 2
        and args.groups == 1
        and not args.transposed
        and all(k == 1 for k in weight.shape[2:])
        and all(p == 0 for p in args.padding)
    )
    return pointwise and (channels_last(input) or _overruns(input, weight, args))


def _overruns(input: Tensor, weight: Tensor, args: ConvArgs) -> bool:
    """Whether the library could write past the end of a 1×1 convolution's weight gradient.

    oneDNN, as in PyTorch 2.15, does so for stride 2 over channels-last data of fewer than 16 channels: on processors with
    AVX-512 if few outputs are asked for, on those without for any number of them. A model whose own layer is like that is
    at its mercy; one of many outputs must not come to be by having some of them dropped.
    """
    return input.device.type == "cpu" and weight.shape[1] < 16 and any(s > 1 for s in args.stride)


def _pointwise_backward(
    grad: Tensor, input: Tensor, weight: Tensor, args: ConvArgs, mask: Sequence[bool], compiling: bool
) -> Gradients:
    """A 1×1 convolution's backward as two matrix products over (N · positions, channels).

    The library's convolution takes up to twice as long for the few channels that are kept: it reorders its operands
    first. A stride only leaves out positions of the input, and puts zeros at their gradients. Shapes as in
    :func:`sparse_backward`.
    """
    last = (0, *range(2, grad.dim()), 1)
    first = (0, grad.dim() - 1, *range(1, grad.dim() - 1))
    rows, matrix = grad.permute(last), weight.reshape(weight.shape[:2])
    gi = gw = None
    if mask[0]:
        gi = (rows.reshape(-1, rows.shape[-1]) @ matrix).reshape(*rows.shape[:-1], matrix.shape[1])
        gi = between_zeros(gi, args.stride, input.shape[2:], compiling).permute(first)
    if mask[1]:
        seen = input[(slice(None), slice(None), *(slice(None, None, s) for s in args.stride))]
        gw = product_of_columns(rows, seen.permute(last), compiling).reshape(weight.shape)
    return gi, gw, None


def _lists(args: ConvArgs) -> tuple:
    return (
        list(args.stride),
        list(args.padding),
        list(args.dilation),
        args.transposed,
        list(args.output_padding),
        args.groups,
    )


def _input_channels(groups: Tensor, per_group: int) -> Tensor:
    if per_group == 1:
        return groups
    return (groups.unsqueeze(1) * per_group + torch.arange(per_group, device=groups.device)).flatten()


def _take_weight(weight: Tensor, index: Tensor, rows: Tensor | None, args: ConvArgs, compiling: bool) -> Tensor:
    if not args.transposed:
        return take(weight, 0, index, compiling)
    if rows is not None:
        return take(weight, 0, rows, compiling)
    if args.groups == 1:
        return take(weight, 1, index, compiling)
    flat = _outputs_first(weight, args.groups)
    return _inputs_first(take(flat, 0, index, compiling), args.groups)


def _spread_weight(
    values: Tensor, weight: Tensor, index: Tensor, rows: Tensor | None, args: ConvArgs, compiling: bool
) -> Tensor:
    if not args.transposed:
        return spread(values, 0, index, weight, compiling)
    if rows is not None:
        return spread(values, 0, rows, weight, compiling)
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
