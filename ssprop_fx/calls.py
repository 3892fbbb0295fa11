"""The rung ``call``: functional convolutions, caught while the forward, or a hook, of the module that makes them runs.

A function mode sees every torch call below it and costs a little for each, so it is put only around those modules whose
code could reach a functional convolution (:mod:`ssprop_fx.reach`).
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ._compat import constant_when_traced, constants_of_objects
from .convolutions import (
    CONVOLUTIONS,
    GENERAL,
    LINEAR,
    SPEC_OF_FUNCTION,
    SPEC_OF_OPERATOR,
    ConvSpec,
    autocast_passes_over,
    bind_general,
    conv_kinds,
)
from .functions import handled
from .sites import Site, constants_of, convolve, convolve_in_graph


class CallSites:
    """The functional convolutions of one module, in the order in which a forward makes them.

    Args:
        owner: the module's name; the first functional ``conv2d`` of its forward is the layer ``owner#conv2d.0``.
        make_site: (layer, spec, kinds) → Site, by the policy; the one that there is, if it decides alike.
        own: for a convolution module that calls the function itself: the layer's site, used for its first call that
            :func:`is_own` does not find to be beside the layer's.
        shape: for such a module: of its weight.
    """

    def __init__(
        self, owner: str, make_site: Callable[..., Site], own: Site | None = None, shape: tuple[int, ...] = ()
    ) -> None:
        self.owner, self.make_site, self.own, self.shape = owner, make_site, own, shape
        self.sites: dict[tuple[str, torch.Size, int], Site] = {}

    def site(self, spec: ConvSpec, nth: int, weight_shape: torch.Size, groups: int, own: bool) -> Site:
        """The site of the ``nth`` call of ``spec``'s function in a forward; of the layer's ``own`` call, the layer's.

        A call that comes with another kernel than before (sampled from several, or of each sample's own) has the same name,
        and is decided upon again, since rules may go by kind.
        """
        if own and self.own is not None:
            return self.own
        layer = functional_name(self.owner, spec.name, nth)
        known = self.sites.get((layer, weight_shape, groups))
        if known is None:
            kinds = conv_kinds(spec, weight_shape, groups, functional=True)
            known = self.sites[layer, weight_shape, groups] = self.make_site(layer, spec, kinds)
        return known


@constant_when_traced
def _constant_settings(
    call_sites: CallSites, function: str, nth: int, weight_shape: torch.Size, groups: int, own: bool
) -> tuple:
    """The operator's settings for a call; Dynamo, which would trace into the policy, takes them for a constant."""
    return constants_of(call_sites.site(CONVOLUTIONS[function], nth, weight_shape, groups, own))


def is_own(module: Any, weight: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a call with such a weight may be the one that a convolution module is there for.

    One with a constant of another shape, as a mask's or a scale's, is not, unless nothing of the module is trained.

    Args:
        shape: of the module's weight.
    """
    return weight.requires_grad or tuple(weight.shape) == shape or not any(p.requires_grad for p in module.parameters())


def functional_name(owner: str, function: str, nth: int) -> str:
    """Layer name of a functional call: ``owner#conv2d.0``; the root's own calls have no owner, ``#conv2d.0``."""
    return f"{owner}#{function}.{nth}"


class _Intercept(TorchFunctionMode):
    def __init__(self, call_sites: CallSites, forward: Any) -> None:
        super().__init__()
        self.call_sites, self.forward = call_sites, forward
        self.counts: dict[str, int] = {}
        own = call_sites.own
        self.own_linear = own if own is not None and own.spec is LINEAR else None  # of a layer with a forward on the instance
        self.own = own.spec if own is not None else None  # until the layer's own call has come
        self.records = torch.is_grad_enabled()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        spec = SPEC_OF_FUNCTION.get(func) or SPEC_OF_OPERATOR.get(func)
        traced = any(issubclass(kind, torch.fx.Proxy) for kind in types)  # to be a call in a graph of torch.fx
        if func is LINEAR.function and self.own_linear is not None and not handled() and not traced:
            site, self.own_linear = self.own_linear, None  # once, as a convolution module's own call
            return convolve(site, **LINEAR.bind(args, kwargs or {}))
        if (spec is None and func not in GENERAL) or handled() or traced:
            return func(*args, **(kwargs or {}))
        if spec is not None:
            bound = spec.bind(args, kwargs or {})
        else:
            spec, bound = bind_general(args, kwargs or {}, lambda weight: weight.dim())
        if autocast_passes_over(func, bound["input"].device.type) and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self._call(spec, bound)
        return self._call(spec, bound)

    def _call(self, spec: ConvSpec, bound: dict[str, Any]) -> Any:
        nth = self.counts.get(spec.name, 0)
        self.counts[spec.name] = nth + 1
        shape, groups = bound["weight"].shape, bound["groups"]
        own = self.own is spec and self._is_own(bound["weight"])
        if own:
            self.own = None
        if constants_of_objects and torch.compiler.is_compiling() and all(type(n) is int for n in (*shape, groups)):
            settings = _constant_settings(self.call_sites, spec.name, nth, shape, groups, own)
            return convolve_in_graph(spec, settings, **bound)
        return convolve(self.call_sites.site(spec, nth, shape, groups, own), **bound)

    def _is_own(self, weight: torch.Tensor) -> bool:
        if not self.records:
            return True  # there is nothing to tell calls by, and no backward pass
        module = getattr(self.forward, "__self__", None)
        return torch.is_grad_enabled() and (module is None or is_own(module, weight, self.call_sites.shape))


def run_intercepted(call_sites: CallSites, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a module's forward, or a hook; the functional convolutions that it makes go through their sites."""
    mode = _Intercept(call_sites, forward)
    with mode:
        result = forward(*args, **kwargs)
    return _each_under(mode, result) if isinstance(result, types.GeneratorType) else result


def _each_under(mode: TorchFunctionMode, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """A generator whose steps run under ``mode``, and what happens between them does not."""
    sent = None
    while True:
        with mode:
            try:
                item = generator.send(sent)
            except StopIteration as end:
                return end.value
        sent = yield item


class Intercepted(functools.partial):
    """:func:`run_intercepted` of a module's forward, with that forward's signature: trainers choose arguments by it."""

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.args[1])

    @property
    def __code__(self) -> types.CodeType:
        """Of that forward, too: Dynamo asks a ``torch.fx.GraphModule`` for it."""
        return self.args[1].__code__


__all__ = ["CallSites", "Intercepted", "functional_name", "run_intercepted"]
