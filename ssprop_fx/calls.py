"""The rung ``call``: functional convolutions, caught while the forward of the module that makes them runs.

A function mode sees every torch call below it and costs a little for each, so it is put only around those modules whose
code could reach a functional convolution. :func:`may_call_convolution` reads the code to find out; when it cannot tell, it
says yes, which costs time and never an answer.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .convolutions import SPEC_OF_FUNCTION, ConvSpec, conv_kinds, spec_of_module
from .sites import Site, convolve, handled

_NAMES = frozenset(spec.name for spec in SPEC_OF_FUNCTION.values()) | {
    "_conv_forward",
    "convolution",
    "_convolution",
}


class CallSites:
    """The functional convolutions of one module, in the order in which a forward makes them.

    Args:
        owner: the module's name; the first functional ``conv2d`` of its forward is the layer ``owner#conv2d.0``.
        make_site: (layer, spec, kinds) → Site, by the policy.
        own: for a convolution module that calls the function itself: the layer's site, used for its first call.
    """

    def __init__(self, owner: str, make_site: Callable[[str, ConvSpec, frozenset[str]], Site], own: Site | None = None) -> None:
        self.owner, self.make_site, self.own = owner, make_site, own
        self.sites: dict[str, Site] = {}

    def site(self, spec: ConvSpec, nth: int, weight_shape: torch.Size, groups: int) -> Site:
        """The site of the ``nth`` call of ``spec``'s function in a forward."""
        if nth == 0 and self.own is not None and self.own.spec is spec:
            return self.own
        layer = functional_name(self.owner, spec.name, nth)
        site = self.sites.get(layer)
        if site is None:
            kinds = conv_kinds(spec, weight_shape, groups, functional=True)
            site = self.sites[layer] = self.make_site(layer, spec, kinds)
        return site


def functional_name(owner: str, function: str, nth: int) -> str:
    """Layer name of a functional call: ``owner#conv2d.0``; the root's own calls have no owner, ``#conv2d.0``."""
    return f"{owner}#{function}.{nth}"


class _Intercept(TorchFunctionMode):
    def __init__(self, call_sites: CallSites) -> None:
        super().__init__()
        self.call_sites = call_sites
        self.counts: dict[str, int] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        spec = SPEC_OF_FUNCTION.get(func)
        if spec is None or handled():
            return func(*args, **(kwargs or {}))
        bound = spec.bind(args, kwargs or {})
        nth = self.counts.get(spec.name, 0)
        self.counts[spec.name] = nth + 1
        site = self.call_sites.site(spec, nth, bound["weight"].shape, bound["groups"])
        return convolve(site, **bound)


def run_intercepted(call_sites: CallSites, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a module's forward; the functional convolutions that it makes go through their sites."""
    with _Intercept(call_sites):
        return forward(*args, **kwargs)


def may_call_convolution(module: nn.Module) -> bool:
    """Whether the module's own forward (not its children's) could call a convolution function.

    Reads the code of the class and of the functions that it can reach, and the functions stored on the instance.
    A convolution module that computes through ``_conv_forward`` does not count: that call is its own.
    """
    if "forward" in vars(module):
        return True  # somebody replaced it on the instance; what it reaches cannot be read off the class
    if any(_value_reaches(value, set()) for value in _stored_functions(module)):
        return True
    cls: Any = type(module)
    return _class_reaches(cls)


def forward_names(module: nn.Module) -> frozenset[str]:
    """Every name that the code of the module's forward mentions (not what it calls)."""
    code = getattr(type(module).forward, "__code__", None)
    return _names_and_strings(code)[0] if code is not None else frozenset()


@functools.cache
def _class_reaches(cls: type) -> bool:
    return _function_reaches(cls.forward, cls, set())  # type: ignore[attr-defined]


def _stored_functions(module: nn.Module) -> Iterator[Any]:
    for value in vars(module).values():
        items = value if isinstance(value, (list, tuple)) else value.values() if type(value) is dict else (value,)
        for item in items:
            if callable(item) and not isinstance(item, (nn.Module, type, torch.Tensor)):
                yield item


def _value_reaches(value: Any, seen: set[Any], cls: type | None = None) -> bool:
    if isinstance(value, functools.partial):
        return any(_value_reaches(v, seen, cls) for v in (value.func, *value.args, *value.keywords.values()))
    if isinstance(value, types.MethodType):
        return _value_reaches(value.__func__, seen, type(value.__self__))
    if isinstance(value, (types.FunctionType, staticmethod, classmethod)):
        return _function_reaches(value, cls, seen)
    if isinstance(value, types.BuiltinFunctionType):
        return value in SPEC_OF_FUNCTION or value.__name__ in _NAMES
    wrapped = getattr(value, "__wrapped__", None)
    if isinstance(wrapped, types.FunctionType):
        return _function_reaches(wrapped, cls, seen)
    return False


def _function_reaches(function: Any, cls: type | None, seen: set[Any]) -> bool:
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None or (code, cls) in seen:
        return False
    seen.add((code, cls))
    if _is_torch(function):
        return False  # torch's own modules and functionals call a convolution only through `_conv_forward`
    names, strings = _names_and_strings(code)
    if names & _NAMES and not (names & _NAMES == {"_conv_forward"} and _is_conv_class(cls)):
        return True
    if "getattr" in names and any(s.startswith("conv") for s in strings):
        return True
    closure = getattr(function, "__closure__", None) or ()
    for cell in closure:
        try:
            if _value_reaches(cell.cell_contents, seen, cls):
                return True
        except ValueError:  # an empty cell
            continue
    for name in names:
        for value in _resolve(name, function, cls, names):
            if _value_reaches(value, seen, cls):
                return True
    return False


def _resolve(name: str, function: Any, cls: type | None, names: frozenset[str]) -> Iterator[Any]:
    found = getattr(function, "__globals__", {}).get(name)
    if isinstance(found, types.ModuleType):
        if not found.__name__.startswith("torch.") and found.__name__ != "torch":
            yield from (v for n in names if callable(v := getattr(found, n, None)) and not isinstance(v, type))
    elif found is not None and not isinstance(found, type):
        yield found
    for klass in cls.__mro__ if cls is not None else ():
        if klass is not nn.Module and name in vars(klass):
            value = vars(klass)[name]
            yield value.fget if isinstance(value, property) else value


def _names_and_strings(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    names: set[str] = set(code.co_names)
    strings: set[str] = set()
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            inner_names, inner_strings = _names_and_strings(const)
            names |= inner_names
            strings |= inner_strings
        elif isinstance(const, str):
            strings.add(const)
    return frozenset(names), frozenset(strings)


def _is_torch(function: Any) -> bool:
    module = getattr(function, "__module__", None) or ""
    return module == "torch" or module.startswith("torch.")


def _is_conv_class(cls: type | None) -> bool:
    return cls is not None and issubclass(cls, nn.modules.conv._ConvNd)


__all__ = ["CallSites", "functional_name", "may_call_convolution", "run_intercepted", "spec_of_module"]
