"""Call sites: what one convolution of a model does with its backward pass, in eager mode and while Dynamo traces.

Every rung ends in :func:`convolve`. In a dense phase, without gradients, or for a frozen layer it makes the very call
that the model would have made; otherwise an ``autograd.Function`` does. (The operator of :mod:`ssprop_fx.ops` would
serve, too, but its dispatch costs four times as much per call; graphs use it.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from ._compat import (
    any_autocast,
    constant_when_traced,
    constants_of_objects,
    forward_ad_active,
    function_modes,
    functorch_active,
    in_function_forward,
    requires_grad,
    running_backward,
    saved_tensors_hooked,
)
from .allocation import Allocation, Follower, observers
from .convolutions import NO_SPACE, ConvArgs, ConvSpec
from .cost import Call
from .functions import SavedTensors, SparseConvolution, TransformableConvolution, unseen
from .policy import Settings

_MOST_CALLS = 1000  # of a layer that a step is taken to make: a model may run forever without any backward pass


class Site(Follower):
    """One convolution of one transformed model.

    Attributes:
        layer: the name users know, as in ``named_modules()``; ``owner#conv2d.0`` for a functional call.
        first_step: the calls of the first step that was seen, those with a gradient; before that the first call without.
        calls: every call from now on, if coverage's measurement has put a list here.
        ran_backward: whether a backward pass of the layer has begun, with which its first step's calls are complete.
        complex: whether its weight turned out to be of complex numbers, which only the call tells where it is computed.
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
        self.first_step: list[Call] = []
        self.ran_backward = self.complex = False
        self._began = (0, -1)  # the clock, and which backward pass was running, when the first step began
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

    def remember(self, input: Tensor, weight: Tensor, output: Tensor, args: ConvArgs, needs: tuple[bool, bool] | None) -> None:
        """Take down what a report says of a call."""
        call = Call.of(input, weight, output, args, needs)
        if self.calls is not None:
            self.calls.append(call)
        else:
            self._take_down(call, output)

    def _take_down(self, call: Call, output: Tensor) -> None:
        """Add a call to the first step's, or see that that is over: with its backward pass, or a step of the clock."""
        steps, backward = self.allocation.policy.steps, running_backward()
        if not self.first_step or self.first_step[0].needs is None:
            self.first_step, self._began = [call], (steps, backward)
            self.known = call.needs is not None and not any(call.needs)
            if output.grad_fn is not None:  # inside an autograd.Function there is none yet, and that one's backward tells
                output.grad_fn.register_prehook(self._note_backward)
        elif call.needs is None:
            return
        elif backward == self._began[1]:  # the forward pass, or the backward pass in which a checkpoint runs it
            over = (self.ran_backward and backward == -1) or steps != self._began[0] or len(self.first_step) == _MOST_CALLS
            self.known = over
            if not over:
                self.first_step.append(call)
        elif self._began[1] != -1:
            self.known = True

    def _note_backward(self, *_: Any) -> None:
        self.ran_backward = True

    def announce(
        self,
        input: Tensor,
        weight: Tensor,
        output: Tensor,
        args: ConvArgs,
        needs: tuple[bool, bool] | None,
        provisional: bool = False,
    ) -> None:
        """Tell the allocation what a call of the layer costs."""
        call, s = Call.of(input, weight, output, args, needs), self.settings
        self.allocation.announce(call.demand(self.layer, s.drop_rate, self.round_to, self.ranking, s.gradients), provisional)

    def note(self, input: Tensor, weight: Tensor, output: Tensor, args: ConvArgs) -> None:
        """Both, of a call in a sparse phase, as far as they are not known."""
        needs = (requires_grad(input), requires_grad(weight))
        if not self.known:
            self.remember(input, weight, output, args, needs)
        if self.allocation.wants(self.layer, self.round_to):
            self.announce(input, weight, output, args, needs)

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
        return unseen(site.spec.call, input, weight, bias, stride, padding, dilation, groups, output_padding)
    try:
        factor = site.allocation.policy.factor
        dense = factor * site.settings.drop_rate <= 0.0 or (site.allocation.stays_dense(site.layer, factor) and not observers)
        if dense or not _wants_gradient(input, weight, bias) or weight.is_complex():
            if not site.known or function_modes():
                return _dense(site, input, weight, bias, stride, padding, dilation, groups, output_padding)
            return site.spec.call(input, weight, bias, stride, padding, dilation, groups, output_padding)
        x, w, b = input, weight, bias
        if any_autocast():
            x, w, b = ops.autocast_arguments(x.device.type, x, w, b)
        x, args, unbatched = site.prepare(x, w, stride, padding, dilation, groups, output_padding)
        if functorch_active() or forward_ad_active():
            output = TransformableConvolution.apply(x, w, b, args, site, factor)
        elif saved_tensors_hooked() and (x.requires_grad or w.requires_grad):
            nodes: list[Any] = []
            x, w = SavedTensors.apply(x, w, nodes)
            output = SparseConvolution.apply(x, w, b, args, site, factor, nodes[0])
        else:
            output = SparseConvolution.apply(x, w, b, args, site, factor, None)
        return output.squeeze(0) if unbatched else output
    except (AttributeError, TypeError, ValueError, RuntimeError):
        _raise_the_functions_error(site, input, weight, bias, stride, padding, dilation, groups, output_padding)
        raise


def _raise_the_functions_error(site: Site, *call: Any) -> None:
    """Make a call that has failed as the original makes it, so that the function says what is wrong with it, if anything is."""
    try:
        with torch.no_grad():  # hooks on what is saved have heard of the call already
            unseen(site.spec.call, *call)
    except Exception as problem:
        raise problem from None


def _wants_gradient(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        weight.requires_grad
        or input.requires_grad
        or (bias is not None and bias.requires_grad)
        or functorch_active()  # inside vmap a tensor does not say what the one around it requires
    )


def _dense(site: Site, input, weight, bias, stride, padding, dilation, groups, output_padding) -> Tensor:
    output = unseen(site.spec.call, input, weight, bias, stride, padding, dilation, groups, output_padding)
    if not site.known:
        site.complex = weight.is_complex()
        call = site.spec.prepare(input, weight, stride, padding, dilation, groups, output_padding)
        batched = output.unsqueeze(0) if call.unbatched else output
        needs = (requires_grad(input), requires_grad(weight)) if torch.is_grad_enabled() else None
        site.remember(call.input, weight, batched, call.args, needs)
        if needs is None and in_function_forward():  # a reentrant checkpoint, say, whose backward runs the call again
            needs = (True, True)
        wanted = site.settings.drop_rate > 0 and not site.complex
        if wanted and site.allocation.wants(site.layer, site.round_to, needs is not None):
            site.announce(call.input, weight, batched, call.args, needs, provisional=True)
    return output


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
