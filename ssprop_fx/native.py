"""Loops in C, for what PyTorch has no operation of one pass over memory: ``kernels/``, float32 on the CPU.

They are built when the package is installed, if there is a C compiler. Without, the same is computed with PyTorch's
operations, which takes longer: most of all for depthwise layers and layers of few channels.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ._compat import dispatch_modes, forward_ad_active, functorch_active
from .convolutions import ConvArgs

logger = logging.getLogger(__name__)

_VERSION = 1  # of the functions' arguments, as in kernels.c

_LEAST = 1 << 15  # elements of a thread: fewer take less time than waking it

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "ssprop_abs_sum": [_POINTER, _LONG, _LONG, _LONG, _INT, _POINTER, _INT],
    "ssprop_kept_channels": [_POINTER, _LONG, _LONG, _LONG, _POINTER],
    "ssprop_take_last": [_POINTER, _LONG, _LONG, _POINTER, _LONG, _POINTER, _INT],
    "ssprop_pointwise": [*[_POINTER] * 4, *[_LONG] * 4, *[_POINTER] * 3, _INT],
    "ssprop_depthwise": [*[_POINTER] * 4, *[_LONG] * 3, *[_POINTER] * 4, _INT],
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
            if getattr(found, "ssprop_version", lambda: 0)() != _VERSION:  # an editable installation whose source has changed
                logger.warning("%s is of another version: some layers take longer until the package is installed again", path)
                return None
            for name, arguments in _ARGUMENTS.items():
                getattr(found, name).argtypes = arguments
            return found
    logger.info("installed without a C compiler: some layers take longer on the CPU")
    return None


library = _load()


def serves(*tensors: Tensor) -> bool:
    """Whether the loops may run over these tensors: dense float32 data, of which nobody records what is done with it."""
    if library is None or torch.compiler.is_compiling() or dispatch_modes() or functorch_active() or forward_ad_active():
        return False
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not recorded and all(map(_plain, tensors))


def _plain(tensor: Tensor) -> bool:
    """Whether the numbers are what lies in memory: no subclass, no sparse layout, no sign that is still to be changed."""
    known = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_neg()
    return known and tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.numel() > 0


def steps(tensor: Tensor) -> tuple[int, int] | None:
    """How far apart neighbouring positions, and channels, of (N, K, *spatial) are in dense memory; None if it is not."""
    if tensor.is_contiguous():
        return 1, _positions(tensor)
    if tensor.dim() > 2 and tensor.permute(0, *range(2, tensor.dim()), 1).is_contiguous():
        return tensor.shape[1], 1
    return None


def _positions(tensor: Tensor) -> int:
    return tensor.numel() // (tensor.shape[0] * tensor.shape[1])


def abs_sum(grad: Tensor) -> Tensor | None:
    """The sum of |grad| over batch and space: (N, K, *spatial) → (K,); None for data that is not dense."""
    layout = steps(grad)
    if layout is None:
        return None
    sums = grad.new_empty(grad.shape[1])
    last = layout[1] == 1
    _run("ssprop_abs_sum", grad, grad.data_ptr(), grad.shape[0], grad.shape[1], _positions(grad), last, sums.data_ptr())
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


def depthwise(
    grad: Tensor, input: Tensor, weight: Tensor, index: Tensor, args: ConvArgs, wants_input: bool
) -> tuple[Tensor | None, Tensor, Tensor] | None:
    """Gradients of a depthwise convolution of one input and one output channel a group, from some of its channels.

    Args:
        grad: (N, C, *out).
        input: (N, C, *in).
        weight: (C, 1, *kernel).
        index: (k,), the channels.
        args: geometry of the convolution, not transposed, of one to three dimensions.
        wants_input: whether the input's gradient is computed.

    Returns:
        The gradients of input, weight and bias, or None for data that is not dense.
    """
    layouts = steps(grad), steps(input)
    if None in layouts:
        return None
    geometry = [
        *(_three(sizes) for sizes in (input.shape[2:], grad.shape[2:], weight.shape[2:], args.stride)),
        _three(args.padding, 0),
        _three(args.dilation),
        *layouts,
    ]
    numbers = [n for part in geometry for n in part]  # type: ignore[union-attr]
    index, kernels = index.contiguous(), weight.contiguous()
    input_grad = torch.empty_like(input) if wants_input else None
    weight_grad, bias_grad = torch.zeros_like(kernels), grad.new_zeros(grad.shape[1])
    _run(
        "ssprop_depthwise", grad,
        grad.data_ptr(), input.data_ptr(), kernels.data_ptr(), index.data_ptr(), index.shape[0], grad.shape[0], grad.shape[1],
        (ctypes.c_int64 * len(numbers))(*numbers),
        0 if input_grad is None else input_grad.data_ptr(), weight_grad.data_ptr(), bias_grad.data_ptr(),
    )  # fmt: skip
    return input_grad, weight_grad, bias_grad


def pointwise(
    grad: Tensor, input: Tensor, weight: Tensor, index: Tensor, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Gradients of an unstrided 1×1 convolution from some of its output channels.

    Args:
        grad: (N, K, *positions), channels last.
        input: (N, C, *positions), channels last.
        weight: (K, C, *ones).
        index: (k,), the output channels.
        mask: whether the gradients of input and weight are computed; that of the bias is.
    """
    index, matrix = index.contiguous(), weight.contiguous()
    input_grad = torch.empty_like(input) if mask[0] else None
    weight_grad = torch.zeros_like(matrix) if mask[1] else None
    bias_grad = grad.new_zeros(grad.shape[1])
    channels, inputs = grad.shape[1], input.shape[1]
    _run(
        "ssprop_pointwise", input,
        grad.data_ptr(), input.data_ptr(), matrix.data_ptr(), index.data_ptr(), index.shape[0], grad.numel() // channels,
        channels, inputs, *(0 if t is None else t.data_ptr() for t in (input_grad, weight_grad)), bias_grad.data_ptr(),
    )  # fmt: skip
    return input_grad, weight_grad, bias_grad


def _three(sizes: Sequence[int], missing: int = 1) -> list[int]:
    return [missing] * (3 - len(sizes)) + [int(size) for size in sizes]


def _run(name: str, data: Tensor, *arguments: object) -> None:
    _check(name, data, *arguments, min(torch.get_num_threads(), 1 + data.numel() // _LEAST))


def _check(name: str, data: Tensor, *arguments: object) -> None:
    if getattr(library, name)(*arguments):
        raise MemoryError(f"no memory for what {name} puts aside of a tensor {tuple(data.shape)}")
