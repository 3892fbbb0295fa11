"""Sums of a batch norm's backward pass as an operator: what a gradient has in common with inputs that are centered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native, operators


def centered_sums(grad: Tensor, inputs: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor:
    """Σ G over batch and space, and Σ G · (x − mean) for each of the inputs.

    These are the gradients of a batch norm's bias and, up to a factor for each channel, of its weight (Ioffe and Szegedy,
    arXiv 1502.03167, section 3).

    Args:
        grad: gradient of the norms' output, (N, C, *spatial).
        inputs: of the norms, of the gradient's shape.
        means: (C,), of each input.

    Returns:
        (1 + inputs, C). Off by single precision's rounding of the sum of absolute values.
    """
    if native.serves(grad, *inputs, *means) and (sums := native.centered_sums(grad, inputs, means)) is not None:
        return sums
    dims, shape = [d for d in range(grad.dim()) if d != 1], [-1, *[1] * (grad.dim() - 2)]
    parts = [grad.sum(dims), *((grad * (x - m.view(shape))).sum(dims) for x, m in zip(inputs, means, strict=True))]
    return torch.stack(parts)


def _fake(grad: Tensor, inputs: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor:
    return grad.new_empty((1 + len(inputs), grad.shape[1]))


operator = operators.define("centered_sums(Tensor grad, Tensor[] inputs, Tensor[] means) -> Tensor", centered_sums, _fake)
