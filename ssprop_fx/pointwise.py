"""The sparse backward pass of 1×1 convolutions over channels-last data: products of matrices over (N · positions, channels).

The library's convolution takes up to twice as long for the few channels that are kept: it reorders its operands first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .convolutions import ConvArgs
from .dense import Gradients
from .gather import between_zeros, channels_last, spread, take
from .products import product_of_columns


def is_pointwise(input: Tensor, weight: Tensor, args: ConvArgs) -> bool:
    """A 1×1 convolution, strided or not, over channels-last data; or one that the library must not compute.

    On accelerators not those in float32, which convolutions may compute in TF32 and products of matrices may not, and not
    strided ones, which the library reads where they lie.

    Args:
        input: (N, C, *in).
        weight: (K, C, *kernel).
        args: geometry of the convolution.
    """
    pointwise = (
        weight.dim() > 2
        and args.groups == 1
        and not args.transposed
        and all(k == 1 for k in weight.shape[2:])
        and all(p == 0 for p in args.padding)
    )
    if pointwise and input.device.type != "cpu" and (input.dtype == torch.float32 or any(s > 1 for s in args.stride)):
        return False
    return pointwise and (channels_last(input) or _overruns(input, weight, args))


def _overruns(input: Tensor, weight: Tensor, args: ConvArgs) -> bool:
    """Whether the library could write past the end of a 1×1 convolution's weight gradient.

    oneDNN, as in PyTorch 2.15, does so for stride 2 over channels-last data of fewer than 16 channels: on processors with
    AVX-512 if few outputs are asked for, on those without for any number of them. A model whose own layer is like that is
    at its mercy; one of many outputs must not come to be by having some of them dropped.
    """
    return input.device.type == "cpu" and weight.shape[1] < 16 and any(s > 1 for s in args.stride)


def pointwise_backward(
    grad: Tensor, input: Tensor, weight: Tensor, index: Tensor, args: ConvArgs, mask: Sequence[bool], compiling: bool = False
) -> Gradients:
    """Gradients of a 1×1 convolution from some of its output channels.

    A stride only leaves out positions of the input, and puts zeros at their gradients.

    Args:
        grad: gradient of the output, (N, K, *out).
        input: (N, C, *in).
        weight: (K, C, *ones).
        index: (k,), the output channels.
        args: geometry of the convolution.
        mask: which of the gradients of input, weight and bias to compute.
        compiling: write what a fusing compiler runs best instead of what eager mode does.

    Returns:
        The gradients of input, weight and bias, None where not asked for.
    """
    last = (0, *range(2, grad.dim()), 1)
    first = (0, grad.dim() - 1, *range(1, grad.dim() - 1))
    kept = take(grad, 1, index, compiling)
    rows, matrix = kept.permute(last), take(weight, 0, index, compiling).reshape(-1, weight.shape[1])
    gi = gw = gb = None
    if mask[0]:
        gi = (rows.reshape(-1, rows.shape[-1]) @ matrix).reshape(*rows.shape[:-1], matrix.shape[1])
        gi = between_zeros(gi, args.stride, input.shape[2:], compiling).permute(first)
    if mask[1]:
        seen = input[(slice(None), slice(None), *(slice(None, None, s) for s in args.stride))]
        gw = product_of_columns(rows, seen.permute(last), compiling).reshape(-1, *weight.shape[1:])
        gw = spread(gw, 0, index, weight, compiling)
    if mask[2]:
        gb = spread(kept.sum([d for d in range(grad.dim()) if d != 1]), 0, index, grad.new_empty(grad.shape[1]), compiling)
    return gi, gw, gb
