"""Loops in C, for what PyTorch has no operation of one pass over memory: ``kernels/``, float32 on the CPU.

They are built when the package is installed, if there is a C compiler. Without, the same is computed with PyTorch's
operations, which takes longer: most of all for depthwise layers and layers of few channels.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ._compat import dispatch_modes, forward_ad_active, functorch_active
from .convolutions import ConvArgs
from .dense import Gradients

logger = logging.getLogger(__name__)

VERSION = 7  # of what the functions take and can do, as in kernels.c

_LEAST = 1 << 15  # elements of a thread: fewer take less time than waking it

_DIRECT, _STEM, _PRODUCTS = range(3)  # as in kernels.c

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "ssprop_abs_sum": [_POINTER, *[_LONG] * 6, _POINTER, _INT],
    "ssprop_centered_sums": [*[_POINTER] * 3, *[_LONG] * 3, _POINTER, _INT],
    "ssprop_kept_channels": [_POINTER, _LONG, _LONG, _LONG, _POINTER],
    "ssprop_take_last": [_POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _INT],
    "ssprop_gradients": [_INT, *[_POINTER] * 4, *[_LONG] * 5, *[_POINTER] * 4, _INT],
}


def _load() -> ctypes.CDLL | None:
    folder = Path(__file__).parent / "kernels"
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_kernels{suffix}"
        try:
            found = ctypes.CDLL(str(path)) if path.exists() else None
        except OSError as problem:  # built on another machine
            logger.warning("%s does not load (%s): some layers take longer", path, problem)
            return None
        if found is not None:
            if getattr(found, "ssprop_version", lambda: 0)() != VERSION:  # an editable installation whose source has changed
                logger.warning("%s is of another version: some layers take longer until the package is installed again", path)
                return None
            for name, arguments in _ARGUMENTS.items():
                getattr(found, name).argtypes = arguments
            return found
    logger.info("installed without a C compiler: some layers take longer on the CPU")
    return None


library = _load()


def serves(*tensors: Tensor) -> bool:
    """Whether the loops may run over these tensors: float32 data, of which nobody records what is done with it.

    Each loop asks for the layouts itself that it can read.
    """
    if library is None or torch.compiler.is_compiling() or dispatch_modes() or functorch_active() or forward_ad_active():
        return False
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not recorded and all(map(_plain, tensors))


def _plain(tensor: Tensor) -> bool:
    """Whether the numbers are what lies in memory: no subclass, no sparse layout, no sign that is still to be changed."""
    known = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_neg()
    here = known and tensor.is_cpu and tensor.dtype is torch.float32 and tensor.numel() > 0
    return here and tensor.data_ptr() != 0  # autograd's zeros that lie nowhere


def channels_innermost(tensor: Tensor) -> bool:
    """Whether channels are innermost in dense memory: also where there is one position, in either format."""
    if not all(type(size) is int for size in tensor.shape):  # a symbol is to be asked as PyTorch asks it
        return tensor.permute(0, *range(2, tensor.dim()), 1).is_contiguous()
    return _innermost(tensor.shape, tensor.stride())


def _innermost(shape: Sequence[int], strides: Sequence[int]) -> bool:
    following = 1
    for d in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[d] != 1 and strides[d] != following:
            return 0 in shape
        following *= shape[d]
    return True


def steps(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int, int] | None:
    """How far apart samples, neighbouring positions, and channels of (N, K, *spatial) are in memory.

    None if positions are not equally far apart. What is cut from the channels of another tensor has steps, too.
    """
    sample, channel, *spatial = strides
    position = following = None  # the next position after a dimension's last one
    for size, step in zip(reversed(shape[2:]), reversed(spatial), strict=True):
        if size == 1:
            continue
        if position is None:
            position = step
        elif step != following:
            return None
        following = step * size
    return sample, sample if position is None else position, channel


def _dense_steps(tensor: Tensor) -> tuple[int, int] | None:
    """How far apart positions and channels are in dense memory, in one of the two layouts; None in any other."""
    if channels_innermost(tensor):
        return tensor.shape[1], 1
    return (1, math.prod(tensor.shape[2:])) if tensor.is_contiguous() else None


def abs_sum(grad: Tensor) -> Tensor | None:
    """The sum of |grad| over batch and space: (N, K, *spatial) → (K,).

    None where neither channels nor positions lie side by side.
    """
    sizes = _sizes(grad.shape, grad.stride())
    if sizes is None:
        return None
    sums = grad.new_empty(grad.shape[1])
    _run("ssprop_abs_sum", grad, grad.data_ptr(), *sizes, sums.data_ptr())
    return sums


@functools.lru_cache(4096)  # what depends on shapes alone would be a tenth of a small layer's time
def _sizes(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """Samples, channels, positions, and how far apart each are; None where neither channels nor positions lie side by side."""
    layout, positions = steps(shape, strides), math.prod(shape[2:])
    if layout is None:
        return None
    sample, position, channel = layout
    even = shape[0] == 1 or sample == position * positions
    return (shape[0], shape[1], positions, *layout) if (even if channel == 1 else position == 1) else None


def centered_sums(grad: Tensor, inputs: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor | None:
    """Sums over batch and space of the gradient, and of its products with inputs that are centered, in one pass.

    Args:
        grad: (N, C, *spatial).
        inputs: of its shape.
        means: (C,), of each input.

    Returns:
        (1 + inputs, C): Σ G, and for each input Σ G · (x − mean); None where channels are not innermost in all of them.
    """
    if not all(map(channels_innermost, (grad, *inputs))):
        return None
    sums, kept = grad.new_empty((1 + len(inputs), grad.shape[1])), [mean.contiguous() for mean in means]
    pointers = [(_POINTER * len(part))(*(t.data_ptr() for t in part)) for part in (inputs, kept)]
    sizes = len(inputs), grad.numel() // grad.shape[1], grad.shape[1]
    _run("ssprop_centered_sums", grad, grad.data_ptr(), *pointers, *sizes, sums.data_ptr())
    return sums


def kept_channels(score: Tensor, groups: int, keep: int) -> Tensor:
    """:func:`ssprop_fx.selection.kept_channels`; of channels of equal score the first are kept."""
    score = score.contiguous()
    index = torch.empty(groups * keep, dtype=torch.int64)
    _check("ssprop_kept_channels", score, score.data_ptr(), score.shape[0], groups, keep, index.data_ptr())
    return index


def take_last(rows: Tensor, index: Tensor) -> Tensor:
    """Some columns of a contiguous matrix: (rows, channels), (k,) → (rows, k)."""
    taken = rows.new_empty((rows.shape[0], index.shape[0]))
    index = index.contiguous()
    arguments = rows.data_ptr(), *rows.shape, index.data_ptr(), index.shape[0], taken.data_ptr()
    _run("ssprop_take_last", rows, *arguments)
    return taken


def direct(
    grad: Tensor, input: Tensor, weight: Tensor, index: Tensor, args: ConvArgs, mask: Sequence[bool]
) -> Gradients | None:
    """Gradients of a convolution from some of its output channels, each pair of an output and an input channel by itself.

    Args:
        grad: (N, K, *out).
        input: (N, C, *in).
        weight: (K, C/g, *kernel).
        index: (k,), the output channels.
        args: geometry of the convolution, not transposed, of one to three dimensions.
        mask: which of the gradients of input, weight and bias to compute.

    Returns:
        The gradients of input, weight and bias, None where not asked for; or None for an input that is not dense, or a gradient
        whose positions are not equally far apart.
    """
    return _gradients(_DIRECT, grad, input, weight, index, args, mask)


def stem(grad: Tensor, input: Tensor, weight: Tensor, index: Tensor, args: ConvArgs, mask: Sequence[bool]) -> Gradients | None:
    """The same of weight and bias only, for an ungrouped convolution of few input channels."""
    return _gradients(_STEM, grad, input, weight, index, args, mask)


def products(
    grad: Tensor, input: Tensor, weight: Tensor, index: Tensor, args: ConvArgs, mask: Sequence[bool]
) -> Gradients | None:
    """The same as products of matrices: for 1×1 convolutions without padding, and for others of few kept channels.

    ``index`` has as many channels of every group, ascending.
    """
    return _gradients(_PRODUCTS, grad, input, weight, index, args, mask)


def _gradients(
    loop: int, grad: Tensor, input: Tensor, weight: Tensor, index: Tensor, args: ConvArgs, mask: Sequence[bool]
) -> Gradients | None:
    layout = _layout(
        loop, grad.shape, grad.stride(), input.shape, input.stride(), weight.shape, weight.stride(),
        tuple(args.stride), tuple(args.padding), tuple(args.dilation),
    )  # fmt: skip
    if layout is None:
        return None
    index, kernels = index.contiguous(), weight if layout.weight_last else weight.contiguous()
    input_grad = torch.empty_like(input) if mask[0] else None
    weight_grad = torch.zeros_like(kernels) if mask[1] else None
    bias_grad = grad.new_zeros(grad.shape[1]) if mask[2] else None
    _run(
        "ssprop_gradients", grad if grad.numel() > input.numel() else input, loop,
        grad.data_ptr(), input.data_ptr(), kernels.data_ptr(), index.data_ptr(),
        index.shape[0], grad.shape[0], grad.shape[1], input.shape[1], args.groups, layout.numbers,
        *[None if g is None else g.data_ptr() for g in (input_grad, weight_grad, bias_grad)],
    )  # fmt: skip
    if weight_grad is not None and weight_grad.stride() != weight.stride():
        weight_grad = torch.empty_like(weight).copy_(weight_grad)
    return input_grad, weight_grad, bias_grad


class _Layout(NamedTuple):
    """``numbers`` are those of a Geometry, as in kernels.c; ``weight_last``: the weight is read with channels innermost."""

    numbers: ctypes.Array[ctypes.c_int64]
    weight_last: bool


@functools.lru_cache(4096)
def _layout(
    loop: int,
    grad: Sequence[int],
    grad_strides: Sequence[int],
    input: Sequence[int],
    input_strides: Sequence[int],
    weight: Sequence[int],
    weight_strides: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> _Layout | None:
    """Of a convolution whose tensors have these shapes and strides; None if a loop cannot read them."""
    grad_steps = steps(grad, grad_strides)
    input_steps = _dense_steps(torch.empty_strided(input, input_strides, device="meta"))
    if grad_steps is None or input_steps is None:
        return None
    last = loop != _DIRECT and _innermost(weight, weight_strides)
    parts: list[Sequence[int]] = [
        *(_three(sizes) for sizes in (input[2:], grad[2:], weight[2:], stride)),
        _three(padding, 0),
        _three(dilation),
        grad_steps,
        input_steps,
        (1, weight[1]) if last else (math.prod(weight[2:]), 1),
    ]
    numbers = [n for part in parts for n in part]
    return _Layout((ctypes.c_int64 * len(numbers))(*numbers), last)


def _three(sizes: Sequence[int], missing: int = 1) -> list[int]:
    return [missing] * (3 - len(sizes)) + [int(size) for size in sizes]


def _run(name: str, data: Tensor, *arguments: object) -> None:
    _check(name, data, *arguments, min(torch.get_num_threads(), 1 + data.numel() // _LEAST))


def _check(name: str, data: Tensor, *arguments: object) -> None:
    if getattr(library, name)(*arguments):
        raise MemoryError(f"no memory for what {name} puts aside of a tensor {tuple(data.shape)}")
