"""Taking some channels of a tensor, and putting them back in their places among zeros.

``ssprop::take`` and ``ssprop::places`` are the same for compiled graphs: to a compiler on the CPU every gather is a kernel of
C++ to be compiled, for seconds, and it runs no faster than PyTorch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._compat import functorch_active

_library = torch.library.Library("ssprop", "FRAGMENT")
_library.define("take(Tensor tensor, int dim, Tensor index) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define("places(Tensor index, SymInt channels) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def take(tensor: Tensor, dim: int, index: Tensor, compiling: bool = False) -> Tensor:
    """``index_select`` that keeps the memory format: with channels last, dim 1 is gathered along the last axis.

    Args:
        tensor: (N, K, *spatial), or a weight.
        dim: 0 or 1.
        index: (k,), whole numbers.
        compiling: write what a fusing compiler runs best.
    """
    operator = compiling and tensor.device.type == "cpu" and not functorch_active()
    select = torch.ops.ssprop.take if operator else _select
    if tensor.dim() <= 2 or not channels_last(tensor):
        return select(tensor, dim, index)
    last = tensor.permute(0, *range(2, tensor.dim()), 1)
    back = (0, tensor.dim() - 1, *range(1, tensor.dim() - 1))
    if dim == 0:
        return select(last, 0, index).permute(back)
    return select(last.reshape(-1, last.shape[-1]), 1, index).reshape(*last.shape[:-1], -1).permute(back)


def spread(values: Tensor, dim: int, index: Tensor, like: Tensor, compiling: bool = False) -> Tensor:
    """The inverse of :func:`take`: a tensor of ``like``'s shape and layout with ``values`` at ``index``, else zero."""
    if not compiling:
        return torch.zeros_like(like, dtype=values.dtype).index_copy_(dim, index, values)
    # Written as a gather, the result is one pass over its memory that a compiler can fuse: no zeros, no scatter. The
    # axes are taken in the order of memory, or the compiler would make a contiguous tensor and copy it.
    place = (_places if functorch_active() else torch.ops.ssprop.places)(index, like.shape[dim])
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda d: (-strides[d], d))
    axis = order.index(dim)
    values = values.permute(order).index_select(axis, place.clamp(min=0))
    kept = (place >= 0).view([-1 if d == axis else 1 for d in range(like.dim())])
    result = torch.where(kept, values, 0)
    return result.permute([order.index(d) for d in range(like.dim())])


def channels_last(tensor: Tensor) -> bool:
    """Whether channels are the innermost dimension of dense memory, (N, *spatial, C)."""
    return tensor.shape[1] > 1 and tensor.permute(0, *range(2, tensor.dim()), 1).is_contiguous()


def _select(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    if dim == 1 and tensor.dim() == 2:  # of a matrix's columns, PyTorch's gather is several times faster
        return tensor.gather(1, index.expand(tensor.shape[0], -1))
    return tensor.index_select(dim, index)


def _places(index: Tensor, channels: int) -> Tensor:
    """(channels,): where each channel stands in ``index``, -1 where it does not."""
    place = torch.full((channels,), -1, device=index.device, dtype=index.dtype)
    return place.scatter(0, index, torch.arange(index.shape[0], device=index.device))


for _name, _kernel in {"take": _select, "places": _places}.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    # autograd sees the operations inside, and calls do not pass by its fallback, which takes as long as they do
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("ssprop::take", _select, lib=_library)
torch.library.register_fake("ssprop::places", lambda index, channels: index.new_empty((channels,)), lib=_library)
