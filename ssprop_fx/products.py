"""Products of matrices whose sum is long and whose result is small: the weight's gradient of a 1×1 convolution.

``ssprop::product`` is the same for compiled graphs: see :mod:`ssprop_fx.gather`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._compat import functorch_active

# 0.55 to 0.9 of the time of the whole product on two cores
_PARTS, _LEAST_ROWS, _MOST_COLUMNS = 16, 512, 128

_library = torch.library.Library("ssprop", "FRAGMENT")
_library.define("product(Tensor a, Tensor b) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def product_of_columns(a: Tensor, b: Tensor, compiling: bool = False) -> Tensor:
    """The sum over all positions of the products of two vectors there.

    Args:
        a: (*positions, k).
        b: (*positions, C), of the same positions.
        compiling: write what a fusing compiler runs best.

    Returns:
        (k, C)
    """
    operator = compiling and a.device.type == "cpu" and not functorch_active()
    return torch.ops.ssprop.product(a, b) if operator else _product(a, b)


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


_library.impl("product", _product, "CompositeExplicitAutograd")
# autograd sees the operations inside
_library.impl("product", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("ssprop::product", lambda a, b: a.new_empty((a.shape[-1], b.shape[-1])), lib=_library)
