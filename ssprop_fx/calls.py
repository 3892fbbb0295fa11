"""The rung ``call``: functional convolutions, caught while the forward of the module that makes them runs.

A function mode sees every torch call below it and costs a little for each, so it is put only around those modules whose
code could reach a functional convolution. :func:`may_call_convolution` reads the code to find out; when it cannot tell, it
says yes, which costs time and never an answer.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .convolutions import GENERAL, SPEC_OF_FUNCTION, ConvSpec, bind_general, conv_kinds, spec_of_module
from .sites import Site, convolve, handled

_Reached = tuple[Any, "type | None"]  # a value, and the class that it is a member of

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
        if (spec is None and func not in GENERAL) or handled():
            return func(*args, **(kwargs or {}))
        if spec is not None:
            bound = spec.bind(args, kwargs or {})
        else:
            spec, bound = bind_general(args, kwargs or {}, lambda weight: weight.dim())
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

    Reads the code of the class and of what it can reach by name: functions of its module and of others, methods of the
    modules and of the plain objects that it holds, functions stored on the instance. A convolution module that computes
    through ``_conv_forward`` does not count: that call is its own.
    """
    if "forward" in vars(module):
        return True  # somebody replaced it on the instance; what it reaches cannot be read off the class
    stored = list(_stored(module))
    held = {type(m) for m in module.modules()} | {type(value) for value in stored}
    cls: Any = type(module)
    if _reaches([(value, None) for value in stored if callable(value)], frozenset()):
        return True
    return _class_reaches(cls, frozenset(c for c in held if not _is_torch(c) and c is not cls))


def forward_names(module: nn.Module) -> frozenset[str]:
    """Every name that the code of the module's forward mentions (not what it calls)."""
    code = getattr(type(module).forward, "__code__", None)
    return _names_and_strings(code)[0] if code is not None else frozenset()


@functools.cache
def _class_reaches(cls: type, held: frozenset[type]) -> bool:
    return _reaches([(cls.forward, cls)], held)  # type: ignore[attr-defined]


def _stored(module: nn.Module) -> Iterator[Any]:
    """Functions and plain objects among a module's attributes, and in the lists and dicts that are its attributes."""
    for value in vars(module).values():
        items = value if isinstance(value, (list, tuple)) else value.values() if type(value) is dict else (value,)
        for item in items:
            if (not isinstance(item, (nn.Module, type, torch.Tensor)) and type(item).__module__ != "builtins") or _is_code(
                item
            ):
                yield item


def _is_code(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType))


def _reaches(todo: list[_Reached], held: frozenset[type]) -> bool:
    """Whether any of these values is, or can come to call, a convolution function."""
    seen: set[Any] = set()
    while todo:
        value, cls = todo.pop()
        if isinstance(value, functools.partial):
            todo += [(v, cls) for v in (value.func, *value.args, *value.keywords.values())]
        elif isinstance(value, types.MethodType):
            todo.append((value.__func__, type(value.__self__)))
        elif isinstance(value, (staticmethod, classmethod)):
            todo.append((value.__func__, cls))
        elif isinstance(value, types.BuiltinFunctionType):
            if value in SPEC_OF_FUNCTION or value.__name__ in _NAMES:
                return True
        elif isinstance(value, types.FunctionType):
            # torch's own modules and functionals call a convolution only through `_conv_forward`
            if (value.__code__, cls) not in seen and not _is_torch(value):
                seen.add((value.__code__, cls))
                if _mentions_convolution(value, cls):
                    return True
                todo += _successors(value, cls, held)
        elif isinstance(getattr(value, "__wrapped__", None), types.FunctionType):
            todo.append((value.__wrapped__, cls))
        elif not isinstance(value, (nn.Module, torch.Tensor, type)) and not _is_torch(type(value)):
            todo += [(v, type(value)) for v in _members(type(value), "__call__") if isinstance(v, types.FunctionType)]
    return False


def _mentions_convolution(function: types.FunctionType, cls: type | None) -> bool:
    names, strings = _names_and_strings(function.__code__)
    if names & _NAMES and not (names & _NAMES == {"_conv_forward"} and _is_conv_class(cls)):
        return True
    return "getattr" in names and any(s.startswith("conv") for s in strings)


def _successors(function: types.FunctionType, cls: type | None, held: frozenset[type]) -> Iterator[_Reached]:
    """What a function may call, each with the class that it is a member of."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell.cell_contents, cls
    names, _ = _names_and_strings(function.__code__)
    for name in names:
        yield from _resolve(name, function, cls, names, held)


def _resolve(
    name: str, function: types.FunctionType, cls: type | None, names: frozenset[str], held: frozenset[type]
) -> Iterator[_Reached]:
    found = function.__globals__.get(name)
    if found is None:  # imported inside the function, it may be
        found = sys.modules.get(name) or sys.modules.get(f"{(function.__module__ or '').rpartition('.')[0]}.{name}")
    if isinstance(found, types.ModuleType):
        if not found.__name__.startswith("torch.") and found.__name__ != "torch":
            yield from ((v, cls) for n in names if callable(v := getattr(found, n, None)) and not isinstance(v, type))
    elif found is not None and not isinstance(found, (type, nn.Module)):
        yield found, cls
        if not _is_code(found) and not _is_torch(type(found)):
            yield from ((value, type(found)) for n in names for value in _members(type(found), n))
    if cls is not None:
        yield from ((value, cls) for value in _members(cls, name))
    if name != "forward":  # a module's own forward is a matter of its own
        yield from ((value, other) for other in held for value in _members(other, name))


def _members(cls: type, name: str) -> Iterator[Any]:
    for klass in cls.__mro__:
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
