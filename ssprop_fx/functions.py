"""Sparse convolutions of eager mode as functions of autograd."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._compat import (
    any_autocast,
    autocast_disabled,
    function_modes,
    functorch_active,
    in_batch_of_gradients,
    keeps_graph,
    wants_gradient_at,
)
from .allocation import observers
from .backward import sparse_backward
from .convolutions import output_channels, run
from .selection import choices

_local = threading.local()  # .handled: the convolution that runs now has been rewritten already


class SavedTensors(torch.autograd.Function):
    """What a convolution saves, saved before it runs, as PyTorch's own does: a checkpoint that has all it needs stops there.

    A list gets the node that holds it.
    """

    @staticmethod
    def forward(ctx, input, weight, nodes):
        ctx.save_for_backward(input, weight)
        ctx.set_materialize_grads(False)
        nodes.append(ctx)
        pairs = zip((input, weight), ctx.needs_input_grad[:2], strict=True)
        given = tuple(t.view_as(t) if needed else t.detach() for t, needed in pairs)
        # or both would seem to require a gradient, and a first layer's cost that of its input's, too
        ctx.mark_non_differentiable(*(t for t, needed in zip(given, ctx.needs_input_grad[:2], strict=True) if not needed))
        return given

    @staticmethod
    def backward(ctx, input_grad, weight_grad):
        return input_grad, weight_grad, None


class SparseConvolution(torch.autograd.Function):
    """Forward as the model's own; what it saves is saved here, or lies in a :class:`SavedTensors`."""

    @staticmethod
    def forward(ctx, input, weight, bias, args, site, factor, saved):
        output = unseen(run, input, weight, bias, args) if function_modes() else run(input, weight, bias, args)
        if not site.known or site.allocation.wants(site.layer, site.round_to):
            site.note(input, weight, output, args)
        ctx.saved = saved
        if saved is None:
            ctx.save_for_backward(input, weight)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.output = (args, site, factor), None
        if site.needs_output:
            # Neither is saved: an activation in place is free to write over the output, and a checkpoint counts what is
            # saved, also of a call that is made again as the model's own. What is gone is computed again.
            ctx.bias = bias
            ctx.output = (output.detach(), output._version) if saved is None else None
        return output

    @staticmethod
    def backward(ctx, grad):
        output, version = ctx.output or (None, 0)
        if output is not None and not keeps_graph():
            ctx.output = None
        return _backward(ctx, grad, _wanted(ctx), output if output is not None and output._version == version else None)


class TransformableConvolution(torch.autograd.Function):
    """For ``torch.func`` and forward mode: five times the call overhead, which is why it is not the only one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, weight, bias, args, site, factor):
        output = unseen(run, input, weight, bias, args)
        site.note(input, weight, output, args)
        return output

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, args, site, factor = inputs
        ctx.saved = None
        ctx.save_for_backward(input, weight, *([bias] if site.needs_output else []))
        ctx.save_for_forward(input, weight)
        ctx.set_materialize_grads(False)
        ctx.call = args, site, factor

    @staticmethod
    def backward(ctx, grad):
        return _backward(ctx, grad, ctx.needs_input_grad[:3])[:6]

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent, *_):
        (input, weight), args = ctx.saved_tensors, ctx.call[0]
        tangent = None
        if input_tangent is not None or bias_tangent is not None:
            moved = torch.zeros_like(input) if input_tangent is None else input_tangent
            tangent = run(moved, weight, bias_tangent, args)
        if weight_tangent is not None:
            of_weight = run(input, weight_tangent, None, args)
            tangent = of_weight if tangent is None else tangent + of_weight
        return tangent


def _backward(ctx, grad, mask, output=None):
    """The gradients of input, weight and bias, those that ``mask`` names, and None for the other arguments."""
    if grad is None:  # nothing that was made of the output had a gradient
        return (None,) * 7
    if any_autocast():  # whoever calls backward inside of autocast, the forward has decided on the types
        with autocast_disabled():
            return _backward(ctx, grad, mask, output)
    input, weight, *saved_bias = (ctx.saved or ctx).saved_tensors
    args, site, factor = ctx.call
    settings = site.settings
    if site.needs_output and output is None:
        with torch.no_grad():
            output = run(input, weight, saved_bias[0] if saved_bias else ctx.bias, args)
    keep = site.allocation.keep(
        site.layer, choices(output_channels(weight.shape, args), args.groups), settings.drop_rate, factor, site.round_to
    )
    site.ran_backward = True
    for observe in observers:
        observe(site.layer)
    # a batch of gradients cannot be written into zeros that are no batch, as is done in eager mode
    compiling = functorch_active() or in_batch_of_gradients(grad)
    grads = sparse_backward(grad, input, weight, output, args, mask, keep, site.ranking, settings.gradients, compiling)
    return (*grads, None, None, None, None)


def _wanted(ctx) -> list[bool]:
    """Which gradients of input, weight and bias this backward pass uses: ``autograd.grad`` may ask for a few only."""
    if torch.compiler.is_compiling():  # compiled autograd, whose nodes are no nodes
        return list(ctx.needs_input_grad[:3])
    edges = list(ctx.next_functions)  # of tensors only: two without a bias
    if ctx.saved is not None:
        edges[:2] = ctx.saved.next_functions
    wanted = [node is not None and wants_gradient_at(node) for node, _ in edges]
    return wanted if len(wanted) == 3 else [*wanted, False]


def unseen(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """A convolution that the function modes further out leave alone."""
    previous, _local.handled = handled(), True
    try:
        return function(*args)
    finally:
        _local.handled = previous


def handled() -> bool:
    """Whether the convolution call that a function mode sees has been rewritten further in."""
    return getattr(_local, "handled", False)


__all__ = ["SavedTensors", "SparseConvolution", "TransformableConvolution", "handled", "unseen"]
