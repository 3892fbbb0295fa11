"""Call sites: what one convolution of a model does with its backward pass, in eager mode and while Dynamo traces.

Every rung ends in :func:`convolve`. In a dense phase, without gradients, or for a frozen layer it makes the very call
that the model would have made; otherwise an ``autograd.Function`` does. (The operator of :mod:`ssprop_fx.ops` would
serve, too, but its dispatch costs four times as much per call; graphs use it.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from ._compat import (
    any_autocast,
    autocast_disabled,
    constant_when_traced,
    constants_of_objects,
    forward_ad_active,
    function_modes,
    functorch_active,
    in_batch_of_gradients,
    keeps_graph,
    saved_tensors_hooked,
    wants_gradient_at,
)
from .allocation import Allocation, observers
from .backward import sparse_backward
from .convolutions import NO_SPACE, ConvArgs, ConvSpec, output_channels, run
from .cost import Call
from .policy import Settings
from .selection import choices

_local = threading.local()  # .handled: the convolution that runs now has been rewritten already


class Site:
    """One convolution of one transformed model.

    Attributes:
        layer: the name users know, as in ``named_modules()``; ``owner#conv2d.0`` for a functional call.
        call: the first call that was seen, one with a gradient if there was any; None before.
        calls: every call from now on, if coverage's measurement has put a list here.
    """

    def __init__(
        self,
        layer: str,
        spec: ConvSpec,
        kinds: frozenset[str],
        settings: Settings,
        allocation: Allocation,
        rung: str,
    ) -> None:
        self.layer, self.spec, self.kinds, self.rung = layer, spec, kinds, rung
        self.settings, self.allocation = settings, allocation
        self.call: Call | None = None
        self.calls: list[Call] | None = None
        self.known = False  # nothing more is to be learned from a call
        self._geometry: tuple | None = None  # the arguments of the last call as they came, and
        self._args = NO_SPACE  # what they are to ``aten.convolution``
        self.ranking = settings.ranking
        self.needs_output = settings.criterion == "taylor"
        self.round_to = settings.multiple

    def prepare(self, input: Tensor, weight: Tensor, *geometry: Any) -> tuple[Tensor, ConvArgs, bool]:
        """``spec.prepare``, remembered: a layer's geometry is nearly always that of its last call."""
        if geometry == self._geometry and input.dim() == self.spec.dim + 2:
            return input, self._args, False
        call = self.spec.prepare(input, weight, *geometry)
        # a list may change in place, and what "same" pads depends on the weight
        if call.input is input and all(isinstance(value, (int, tuple)) for value in geometry):
            self._geometry, self._args = geometry, call.args
        return call

    def operator_settings(self) -> tuple[str, float, str, int, str, str]:
        """The settings as the operator takes them."""
        return self.settings.as_arguments(self.layer, self.allocation.handle)


def convolve(
    site: Site,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    output_padding: Any = 0,
) -> Tensor:
    """The convolution of ``site``: forward as the model's own, bit for bit; backward by the policy.

    Shapes and errors are those of the function in ``torch.nn.functional``.
    """
    if torch.compiler.is_compiling():
        settings = _graph_settings(site)
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return convolve_in_graph(site.spec, settings, input, weight, bias, **geometry, output_padding=output_padding)
    if torch.jit.is_tracing():  # a trace is made for its forward pass, and what we notice of a call would be part of it
        return _unseen(site.spec.call, input, weight, bias, stride, padding, dilation, groups, output_padding)
    factor = site.allocation.policy.factor
    dense = factor * site.settings.drop_rate <= 0.0 or (site.allocation.stays_dense(site.layer, factor) and not observers)
    if dense or not _wants_gradient(input, weight, bias) or weight.is_complex():
        if not site.known or function_modes():
            return _dense(site, input, weight, bias, stride, padding, dilation, groups, output_padding)
        return site.spec.call(input, weight, bias, stride, padding, dilation, groups, output_padding)
    if any_autocast():
        input, weight, bias = ops.autocast_arguments(input.device.type, input, weight, bias)
    input, args, unbatched = site.prepare(input, weight, stride, padding, dilation, groups, output_padding)
    if functorch_active() or forward_ad_active():
        output = _TransformableConvolution.apply(input, weight, bias, args, site, factor)
    elif saved_tensors_hooked() and (input.requires_grad or weight.requires_grad):
        nodes: list[Any] = []
        input, weight = _Saved.apply(input, weight, nodes)
        output = _Convolution.apply(input, weight, bias, args, site, factor, nodes[0])
    else:
        output = _Convolution.apply(input, weight, bias, args, site, factor, None)
    return output.squeeze(0) if unbatched else output


def _wants_gradient(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        weight.requires_grad
        or input.requires_grad
        or (bias is not None and bias.requires_grad)
        or functorch_active()  # inside vmap a tensor does not say what the one around it requires
    )


def _dense(site: Site, input, weight, bias, stride, padding, dilation, groups, output_padding) -> Tensor:
    output = _unseen(site.spec.call, input, weight, bias, stride, padding, dilation, groups, output_padding)
    if not site.known:
        call = site.spec.prepare(input, weight, stride, padding, dilation, groups, output_padding)
        batched = output.unsqueeze(0) if call.unbatched else output
        needs = (input.requires_grad, weight.requires_grad) if torch.is_grad_enabled() else None
        _remember(site, call.input, weight, batched, call.args, needs)
        if site.settings.drop_rate > 0 and site.allocation.wants(site.layer, site.round_to):
            _announce(site, call.input, weight, batched, call.args, needs, provisional=True)
    return output


def _announce(site: Site, input, weight, output, args, needs, provisional: bool = False) -> None:
    call, s = Call.of(input, weight, output, args, needs), site.settings
    site.allocation.announce(call.demand(site.layer, s.drop_rate, site.round_to, site.ranking, s.gradients), provisional)


def _note(site: Site, input, weight, output, args) -> None:
    needs = (input.requires_grad, weight.requires_grad)
    if not site.known:
        _remember(site, input, weight, output, args, needs)
    if site.allocation.wants(site.layer, site.round_to):
        _announce(site, input, weight, output, args, needs)


def _unseen(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """A convolution that the function modes further out leave alone."""
    previous, _local.handled = handled(), True
    try:
        return function(*args)
    finally:
        _local.handled = previous


def handled() -> bool:
    """Whether the convolution call that a function mode sees has been rewritten further in."""
    return getattr(_local, "handled", False)


def _remember(
    site: Site, input: Tensor, weight: Tensor, output: Tensor, args: ConvArgs, needs: tuple[bool, bool] | None
) -> None:
    call = Call.of(input, weight, output, args, needs)
    if site.call is None or site.call.needs is None:
        site.call = call
    if site.calls is not None:
        site.calls.append(call)
    site.known = site.call.needs is not None and site.calls is None


def _graph_settings(site: Site) -> tuple:
    # A layer that stays dense is an operator, too, of drop rate zero: a mode further out must not take it for its own.
    if constants_of_objects:
        return _constant_settings(site)
    _register_formulas()
    return site.operator_settings()


def convolve_in_graph(
    spec: ConvSpec, settings: tuple, input: Tensor, weight: Tensor, bias: Tensor | None, **geometry: Any
) -> Tensor:
    """:func:`convolve` while Dynamo traces: the operator, with a site's settings."""
    call = spec.prepare(input, weight, **geometry)
    output = ops.conv(call.input, weight, bias, *call.args, *settings)
    return output.squeeze(0) if call.unbatched else output


def constants_of(site: Site) -> tuple:
    """What of a site is a constant of a traced graph."""
    ops.register_flop_formulas()
    return site.operator_settings()


_constant_settings = constant_when_traced(constants_of)


@constant_when_traced
def _register_formulas() -> bool:
    ops.register_flop_formulas()
    return True


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
    for observe in observers:
        observe(site.layer)
    # a batch of gradients cannot be written into zeros that are no batch, as is done in eager mode
    compiling = functorch_active() or in_batch_of_gradients(grad)
    grads = sparse_backward(grad, input, weight, output, args, mask, keep, site.ranking, settings.gradients, compiling)
    return (*grads, None, None, None, None)


class _Saved(torch.autograd.Function):
    """What a convolution saves, saved before it runs, as PyTorch's own does: a checkpoint that has all it needs stops there.

    A list gets the node that holds it.
    """

    @staticmethod
    def forward(ctx, input, weight, nodes):
        ctx.save_for_backward(input, weight)
        ctx.set_materialize_grads(False)
        nodes.append(ctx)
        needs = ctx.needs_input_grad
        return tuple(t.view_as(t) if needed else t.detach() for t, needed in zip((input, weight), needs[:2], strict=True))

    @staticmethod
    def backward(ctx, input_grad, weight_grad):
        return input_grad, weight_grad, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, args, site, factor, saved):
        output = _unseen(run, input, weight, bias, args) if function_modes() else run(input, weight, bias, args)
        if not site.known or site.allocation.wants(site.layer, site.round_to):
            _note(site, input, weight, output, args)
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


def _wanted(ctx) -> list[bool]:
    """Which gradients of input, weight and bias this backward pass uses: ``autograd.grad`` may ask for a few only."""
    if torch.compiler.is_compiling():  # compiled autograd, whose nodes are no nodes
        return list(ctx.needs_input_grad[:3])
    edges = list(ctx.next_functions)  # of tensors only: two without a bias
    if ctx.saved is not None:
        edges[:2] = ctx.saved.next_functions
    wanted = [node is not None and wants_gradient_at(node) for node, _ in edges]
    return wanted if len(wanted) == 3 else [*wanted, False]


class _TransformableConvolution(torch.autograd.Function):
    """For ``torch.func`` and forward mode: five times the call overhead, which is why it is not the only one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, weight, bias, args, site, factor):
        output = _unseen(run, input, weight, bias, args)
        _note(site, input, weight, output, args)
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


def convolve_module(module: nn.Module, site: Site, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Stands in for ``_conv_forward`` of a convolution module; its own ``forward`` and hooks run as ever."""
    m: Any = module
    padding = m.padding
    if m.padding_mode != "zeros":
        input = nn.functional.pad(input, m._reversed_padding_repeated_twice, mode=m.padding_mode)
        padding = 0
    return convolve(site, input, weight, bias, m.stride, padding, m.dilation, m.groups)


def convolve_transposed_module(module: nn.Module, site: Site, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    """Stands in for ``forward`` of a transposed convolution module."""
    m: Any = module
    if m.padding_mode != "zeros":
        return type(m).forward(m, input, output_size)  # raises what it always raised
    output_padding = m._output_padding(input, output_size, m.stride, m.padding, m.kernel_size, site.spec.dim, m.dilation)
    return convolve(site, input, m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups, output_padding)


def convolve_linear_module(module: nn.Module, site: Site, input: Tensor) -> Tensor:
    """Stands in for ``forward`` of a linear module."""
    m: Any = module
    return convolve(site, input, m.weight, m.bias)
