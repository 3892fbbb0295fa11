"""Taking some channels of a tensor, and putting them back in their places among zeros.

For compiled graphs most of it is operators (:mod:`ssprop_fx.operators`). ``ssprop::one_after`` keeps apart what a compiler
would put into one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native, operators

# In compiled code of accelerators channels are compared with one another, up to so many pairs, where otherwise each layer
# would call the library to sort or to scatter.
COMPARED = 1 << 23


def take(tensor: Tensor, dim: int, index: Tensor, compiling: bool = False) -> Tensor:
    """``index_select`` that keeps the memory format: with channels last, dim 1 is gathered along the last axis.

    Args:
        tensor: (N, K, *spatial), or a weight.
        dim: 0 or 1.
        index: (k,), whole numbers.
        compiling: write what a fusing compiler runs best.
    """
    return (_take_operator if operators.wanted(tensor, compiling) else _take)(tensor, dim, index)


def spread(values: Tensor, dim: int, index: Tensor, like: Tensor, compiling: bool = False) -> Tensor:
    """The inverse of :func:`take`: a tensor of ``like``'s shape and layout with ``values`` at ``index``, else zero."""
    if not compiling:
        return _spread(values, dim, index, like)
    # the axes are taken in the order of memory, or the compiler would make a contiguous tensor and copy it
    strides, operator = like.stride(), operators.wanted(values, compiling)
    order = sorted(range(like.dim()), key=lambda d: (-strides[d], d))
    if order[0] == dim and operator:
        return _put_operator(values, index, like.shape[dim], order)
    # as a gather it is one pass over its memory that a compiler can fuse: no zeros, no scatter
    counts = not operator and index.shape[0] * like.shape[dim] <= COMPARED
    place = (_places_operator if operator else _counted_places if counts else _places)(index, like.shape[dim])
    axis = order.index(dim)
    kept = (place >= 0).view([-1 if d == axis else 1 for d in range(like.dim())])
    result = torch.where(kept, values.permute(order).index_select(axis, place.clamp(min=0)), 0)
    return result.permute(_inverse(order))


def between_zeros(values: Tensor, stride: Sequence[int], sizes: Sequence[int], compiling: bool = False) -> Tensor:
    """(N, *out, C) → (N, *sizes, C): the values at the positions that are a multiple of the stride, among zeros."""
    if all(s == 1 for s in stride):
        return values
    operator = operators.wanted(values, compiling)
    return (_between_zeros_operator if operator else _between_zeros)(values, list(stride), list(sizes))


def after(tensor: Tensor) -> Tensor:
    """The tensor, for a reader that a fusing compiler is to keep out of the kernel that writes it.

    Readers that differ from phase to phase would make every such kernel another one, to be compiled for a second and more.
    """
    return tensor * _one_after_operator(tensor)


def channels_last(tensor: Tensor) -> bool:
    """Whether channels are the innermost dimension of dense memory, (N, *spatial, C)."""
    return tensor.shape[1] > 1 and native.channels_innermost(tensor)


def _take(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    if tensor.dim() > 2 and all(size == 1 for size in tensor.shape[2:]) and tensor.is_contiguous():  # in either format
        return _select(tensor.flatten(1), dim, index)[(..., *[None] * (tensor.dim() - 2))]
    if tensor.dim() <= 2 or not channels_last(tensor):
        return _select(tensor, dim, index)
    last = tensor.permute(0, *range(2, tensor.dim()), 1)
    back = (0, tensor.dim() - 1, *range(1, tensor.dim() - 1))
    if dim == 0:
        return _select(last, 0, index).permute(back)
    rows = last.reshape(-1, last.shape[-1])
    taken = native.take_last(rows, index) if native.serves(rows) else _select(rows, 1, index)
    return taken.reshape(*last.shape[:-1], *index.shape).permute(back)


def _spread(values: Tensor, dim: int, index: Tensor, like: Tensor) -> Tensor:
    if dim == 1 and like.dim() > 2 and channels_last(like):  # of a matrix's columns, PyTorch's scatter is twice as fast
        *sizes, channels = (like.shape[0], *like.shape[2:], like.shape[1])
        last = (0, *range(2, like.dim()), 1)
        rows = values.permute(last).reshape(-1, index.shape[0])
        result = rows.new_zeros((rows.shape[0], channels)).scatter_(1, index.expand(rows.shape[0], -1), rows)
        return result.view(*sizes, channels).permute(0, like.dim() - 1, *range(1, like.dim() - 1))
    return torch.zeros_like(like, dtype=values.dtype).index_copy_(dim, index, values)


def _select(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    if dim == 1 and tensor.dim() == 2:  # of a matrix's columns, PyTorch's gather is several times faster
        return tensor.gather(1, index.expand(tensor.shape[0], -1))
    return tensor.index_select(dim, index)


def _places(index: Tensor, channels: int) -> Tensor:
    """(channels,): where each channel stands in ``index``, -1 where it does not."""
    place = torch.full((channels,), -1, device=index.device, dtype=index.dtype)
    return place.scatter(0, index, torch.arange(index.shape[0], device=index.device))


def _counted_places(index: Tensor, channels: int) -> Tensor:
    """The same by comparing all with all, of which a compiler makes one kernel."""
    here = index == torch.arange(channels, device=index.device).unsqueeze(1)
    return torch.where(here, torch.arange(1, index.shape[0] + 1, device=index.device), 0).sum(1) - 1


def _places_fake(index: Tensor, channels: int) -> Tensor:
    return index.new_empty((channels,))


def _put(values: Tensor, index: Tensor, channels: int, order: list[int]) -> Tensor:
    """The values in their places along the outermost of the dimensions in ``order`` (of memory), among zeros."""
    values = values.permute(order)
    return values.new_zeros((channels, *values.shape[1:])).index_copy_(0, index, values).permute(_inverse(order))


def _put_fake(values: Tensor, index: Tensor, channels: int, order: list[int]) -> Tensor:
    return values.new_empty((channels, *(values.shape[d] for d in order[1:]))).permute(_inverse(order))


def _between_zeros(values: Tensor, stride: list[int], sizes: list[int]) -> Tensor:
    result = values.new_zeros((values.shape[0], *sizes, values.shape[-1]))
    result[(slice(None), *(slice(None, None, s) for s in stride))] = values
    return result


def _between_zeros_fake(values: Tensor, stride: list[int], sizes: list[int]) -> Tensor:
    return values.new_empty((values.shape[0], *sizes, values.shape[-1]))


def _one_after(tensor: Tensor) -> Tensor:
    return tensor.new_ones(())


def _one_after_fake(tensor: Tensor) -> Tensor:
    return tensor.new_empty(())


def _inverse(order: list[int]) -> list[int]:
    return [order.index(d) for d in range(len(order))]


_take_operator = operators.define("take(Tensor tensor, int dim, Tensor index) -> Tensor", _take, _take)
_places_operator = operators.define("places(Tensor index, SymInt channels) -> Tensor", _places, _places_fake)
_put_operator = operators.define("put(Tensor values, Tensor index, SymInt channels, int[] order) -> Tensor", _put, _put_fake)
_between_zeros_operator = operators.define(
    "between_zeros(Tensor values, SymInt[] stride, SymInt[] sizes) -> Tensor", _between_zeros, _between_zeros_fake
)
_one_after_operator = operators.define("one_after(Tensor tensor) -> Tensor", _one_after, _one_after_fake)
