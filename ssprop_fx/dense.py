"""The dense backward pass of a convolution or linear layer: what PyTorch computes, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .convolutions import ConvArgs

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def dense_backward(grad: Tensor, input: Tensor, weight: Tensor, args: ConvArgs, mask: Sequence[bool]) -> Gradients:
    """``aten.convolution_backward``. Shapes as in :func:`ssprop_fx.backward.sparse_backward`."""
    if not any(mask):
        return None, None, None
    if weight.dim() == 2:
        return _linear_backward(grad, input, weight, mask)
    bias_sizes = [grad.shape[1]] if mask[2] else None
    grads = torch.ops.aten.convolution_backward.default(grad, input, weight, bias_sizes, *_lists(args), list(mask))
    return asked_for(grads, mask)


def asked_for(grads: Sequence[Tensor | None], mask: Sequence[bool]) -> Gradients:
    """Those of the gradients of input, weight and bias that ``mask`` names; None for the others."""
    return grads[0] if mask[0] else None, grads[1] if mask[1] else None, grads[2] if mask[2] else None


def _linear_backward(grad: Tensor, input: Tensor, weight: Tensor, mask: Sequence[bool]) -> Gradients:
    """A linear layer's backward, (*batch, K) and (*batch, C), in the products that autograd takes."""
    rows, values = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
    gi = (rows @ weight).reshape(input.shape) if mask[0] else None
    gw = rows.t() @ values if mask[1] else None
    return gi, gw, rows.sum(0) if mask[2] else None


def _lists(args: ConvArgs) -> tuple:
    return (
        list(args.stride),
        list(args.padding),
        list(args.dilation),
        args.transposed,
        list(args.output_padding),
        args.groups,
    )
