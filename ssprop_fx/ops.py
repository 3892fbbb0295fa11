"""``ssprop::conv`` and ``ssprop::conv_backward``: schema, kernels, fake kernels, autograd, autocast, FLOP formulas.

``conv`` computes what ``aten.convolution`` does; its autograd is ``conv_backward``, which uses only the kept channels of
the output's gradient. The layer's name and settings are arguments, so that a graph reads well and hashes by what it does.
``allocation`` names the live state that holds the schedule's factor and the rounding budget; with ``""`` the factor is one
and ``round_to: auto`` (0) rounds by the layer alone.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._compat import is_traced
from .allocation import allocation_for, live_allocation, observers
from .backward import dense_backward, sparse_backward
from .convolutions import ConvArgs, conv_backward_flops, output_channels, run
from .cost import Call
from .errors import SSPropError
from .loops import kept_backward_flops
from .masking import is_masked
from .products import product_flops
from .selection import AUTO, Demand, choices, fast_granule, keep_count, plan_counts

_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups"
_SETTINGS = "str layer, float drop_rate, str criterion, int round_to, str gradients, str allocation"

_library = torch.library.Library("ssprop", "DEF")
_library.define(
    f"conv(Tensor input, Tensor weight, Tensor? bias, {_GEOMETRY}, {_SETTINGS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    f"conv_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? output, {_GEOMETRY}, "
    f"bool[] output_mask, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)

conv = torch.ops.ssprop.conv.default
conv_backward = torch.ops.ssprop.conv_backward.default

SETTINGS_AT = 9  # position of `layer` in conv's arguments
BACKWARD_SETTINGS_AT = 11


def kept_now(
    layer: str,
    drop_rate: float,
    round_to: int,
    allocation: str,
    weight: Tensor,
    args: ConvArgs,
) -> int:
    """Channels (or whole groups, for depthwise) that the layer's next backward pass keeps."""
    channels = choices(output_channels(weight.shape, args), args.groups)
    if allocation:
        live = allocation_for(allocation)
        return live.keep(layer, channels, drop_rate, live.policy.factor, round_to)
    if round_to != AUTO:
        return keep_count(drop_rate, channels, round_to)
    demand = Demand(layer, channels, channels, drop_rate, fast_granule(weight.dtype, weight.device))
    return plan_counts([demand])[layer]


def _conv_kernel(input, weight, bias, *rest):
    allocation = rest[-1]
    output = run(input, weight, bias, ConvArgs(*rest[:6]))
    live = None if torch.compiler.is_compiling() else live_allocation(allocation)
    layer, drop_rate, criterion, round_to, gradients, _ = rest[6:]
    if live is not None and live.wants(layer, round_to):
        call = Call.of(input, weight, output, ConvArgs(*rest[:6]), (input.requires_grad, weight.requires_grad))
        live.announce(call.demand(layer, drop_rate, round_to, criterion, gradients))
    return output


def _conv_backward_kernel(grad, input, weight, output, *rest):
    args, mask = ConvArgs(*rest[:6]), rest[6]
    layer, drop_rate, criterion, round_to, gradients, allocation = rest[7:]
    keep = kept_now(layer, drop_rate, round_to, allocation, weight, args)
    for observe in observers:
        observe(layer)
    grads = sparse_backward(grad, input, weight, output, args, mask, keep, criterion, gradients)
    expected = _conv_backward_fake(*(t if t is None else t.to("meta") for t in (grad, input, weight, output)), *rest)
    return tuple(_laid_out(g, e) for g, e in zip(grads, expected, strict=True))


def _laid_out(grad: Tensor | None, expected: Tensor | None) -> Tensor | None:
    if grad is None or expected is None or grad.stride() == expected.stride():
        return grad
    return torch.empty_strided(expected.shape, expected.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)


def _conv_fake(input, weight, bias, *rest):
    return run(input, weight, bias, ConvArgs(*rest[:6]))


def _conv_backward_fake(grad, input, weight, output, *rest):
    return dense_backward(grad, input, weight, ConvArgs(*rest[:6]), rest[6])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, weight, bias, *rest = inputs
    # an activation in place is free to write over the output; where none does, compilers leave the copy out
    ctx.save_for_backward(input, weight, output.clone() if rest[8].startswith("taylor") else None)
    ctx.has_bias, ctx.rest = bias is not None, rest


def _autograd(ctx: Any, grad: Tensor) -> tuple:
    input, weight, output = ctx.saved_tensors
    rest = ctx.rest
    needs = ctx.needs_input_grad
    mask = [needs[0], needs[1], ctx.has_bias and needs[2]]
    call = (*rest[:6], mask, *rest[6:])
    if torch.is_grad_enabled() and not is_traced(grad):
        # double backward: the same gradients from differentiable operations
        args = ConvArgs(*rest[:6])
        keep = kept_now(rest[6], rest[7], rest[9], rest[11], weight, args)
        grads = sparse_backward(grad, input, weight, output, args, mask, keep, rest[8], rest[10])
    else:
        grads = conv_backward(grad, input, weight, output, *call)
    return (*(g if m else None for g, m in zip(grads, mask, strict=True)), *[None] * len(rest))


def _no_double_backward(ctx: Any, *grads: Any) -> tuple:
    raise SSPropError(
        "double backward through compiled code is not supported; leave what differentiates twice out of torch.compile, "
        "where ssprop_fx.transform supports it"
    )


def _conv_vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Tensor, int]:
    """One call for each sample, which chooses by itself, as ``torch.func.vmap`` of independent networks means it."""

    def of_sample(i: int) -> Tensor:
        own = (a if dim is None else a.select(dim, i) for a, dim in zip(args[:3], in_dims[:3], strict=True))
        return conv(*own, *args[3:])

    return torch.stack([of_sample(i) for i in range(info.batch_size)]), 0


def _autocast(device_type: str, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    input, weight, bias = autocast_arguments(device_type, input, weight, bias)
    with torch.amp.autocast(device_type, enabled=False):
        return conv(input, weight, bias, *rest)


def autocast_arguments(device_type: str, *tensors: Tensor | None) -> tuple:
    """The tensors as autocast would hand them to a convolution: in its lower precision where it applies."""
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype)
        if t is not None and t.is_floating_point() and t.dtype != torch.float64 and t.device.type == device_type
        else t
        for t in tensors
    )


_library.impl("conv", _conv_kernel, "CompositeExplicitAutograd")
_library.impl("conv_backward", _conv_backward_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("ssprop::conv", _conv_fake, lib=_library)
torch.library.register_fake("ssprop::conv_backward", _conv_backward_fake, lib=_library)
torch.library.register_autograd("ssprop::conv", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("ssprop::conv_backward", _no_double_backward, lib=_library)
torch.library.register_vmap("ssprop::conv", _conv_vmap, lib=_library)
for _device in ("cpu", "cuda", "xpu", "mps"):
    _library.impl("conv", functools.partial(_autocast, _device), f"Autocast{_device.upper()}")


@functools.cache
def register_flop_formulas() -> None:
    """Make ``torch.utils.flop_counter`` count the operators.

    Called when a graph gets the first of them: importing the counter imports Triton, which eager mode does not need.
    """
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.ssprop.product)(product_flops)
    register_flop_formula(torch.ops.ssprop.kept_backward)(kept_backward_flops)
    register_flop_formula(torch.ops.ssprop.conv)(_conv_flops)
    register_flop_formula(torch.ops.ssprop.conv_backward, get_raw=True)(_conv_backward_flops)


def _conv_flops(input_shape, weight_shape, bias_shape, *rest, out_shape=None, **_) -> int:
    args = ConvArgs(*rest[:6])
    positions = input_shape if args.transposed else out_shape
    return conv_backward_flops(positions, weight_shape, outputs=1)


def _conv_backward_flops(grad, input, weight, output, *rest, out_val=None, **_) -> int:
    args, mask = ConvArgs(*rest[:6]), rest[6]
    layer, drop_rate, criterion, round_to, gradients, allocation = rest[7:]
    keep = kept_now(layer, drop_rate, round_to, allocation, weight, args)
    shape = input.shape if args.transposed else grad.shape
    one = conv_backward_flops(shape, weight.shape, outputs=1)
    kept = one if is_masked(criterion) else one * keep // choices(output_channels(weight.shape, args), args.groups)
    return (one if gradients == "weight" else kept) * mask[0] + kept * mask[1]


if "torch.utils.flop_counter" in sys.modules:  # whoever imported it means to count
    register_flop_formulas()
