"""Products of matrices whose sum is long and whose result is small: the weight's gradient of a 1×1 convolution.

For compiled graphs on the CPU it is an operator, ``ssprop::product`` (:mod:`ssprop_fx.operators`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import operators

# 0.55 to 0.9 of the time of the whole product on two cores
_PARTS, _LEAST_ROWS, _MOST_COLUMNS = 16, 512, 128


def product_of_columns(a: Tensor, b: Tensor, compiling: bool = False) -> Tensor:
    """The sum over all positions of the products of two vectors there.

    Args:
        a: (*positions, k).
        b: (*positions, C), of the same positions.
        compiling: write what a fusing compiler runs best.

    Returns:
        (k, C)
    """
    return (_product_operator if operators.wanted(a, compiling) else _product)(a, b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The sum in parts: the library divides the result among threads, not the sum, and each would read all of ``b``."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    m, k = a.shape
    # half precision would round every part; a number of rows that is a symbol must not be asked, or is that of one size
    divides = a.device.type == "cpu" and a.dtype in (torch.float32, torch.float64) and isinstance(m, int) and k <= _MOST_COLUMNS
    parts = min(_PARTS, m // _LEAST_ROWS) if divides else 1
    if parts < 2 or m % parts:
        return a.t() @ b
    return torch.bmm(a.reshape(parts, -1, k).transpose(1, 2), b.reshape(parts, -1, b.shape[1])).sum(0)


def product_flops(a_shape: torch.Size, b_shape: torch.Size, *_, **__) -> int:
    """FLOPs of ``ssprop::product``, for ``torch.utils.flop_counter``."""
    return 2 * a_shape.numel() * b_shape[-1]


def _product_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[-1], b.shape[-1]))


_product_operator = operators.define("product(Tensor a, Tensor b) -> Tensor", _product, _product_fake)
