"""Whether a module's forward could call a convolution function: read off the code, before anything runs.

:func:`may_call_convolution` follows what the forward mentions by name: functions of its module and of others, methods of the
modules and of the plain objects that it holds, what lies in tables, defaults and closures. When it cannot tell, it says yes,
which costs time and never an answer.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import sys
import types
from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import nn

from .convolutions import GENERAL, SPEC_OF_FUNCTION, spec_of_module

_Reached = tuple[Any, "type | None"]  # a value, and the class that it is a member of

# Whoever mentions one of these may call a convolution, or anything.
_NAMES = frozenset(spec.name for spec in SPEC_OF_FUNCTION.values()) | {"_conv_forward", "convolution", "_convolution"}
_CLASSES = frozenset(spec.module.__name__ for spec in SPEC_OF_FUNCTION.values())
_ANYTHING = frozenset({"eval", "exec", "attrgetter", "methodcaller"})

_OPERATORS = ("add", "sub", "mul", "matmul", "truediv", "pow", "mod", "and", "or", "xor", "lshift", "rshift")
_IMPLICIT = frozenset(
    [f"__{prefix}{name}__" for name in _OPERATORS for prefix in ("", "r", "i")]
    + ["__call__", "__enter__", "__exit__", "__getitem__", "__iter__", "__next__", "__neg__"]
)
_PLAIN = (str, bytes, int, float, complex, type(None), type(...), torch.dtype, torch.device, torch.Tensor)  # lead nowhere

_CONTAINERS = (list, tuple, set, frozenset, dict, types.MappingProxyType)
_DEPTH = 8  # of plain objects and containers within each other


def may_call_convolution(module: nn.Module, tree: Set[int] = frozenset()) -> bool:
    """Whether the module's own forward (not its children's) could call a convolution function.

    A convolution module that computes through ``_conv_forward`` does not count: that call is its own.

    Args:
        tree: ids of all modules of the model, which are looked at one by one; other modules that this one refers to belong
            to it.
    """
    if "forward" in vars(module):
        return True  # somebody replaced it on the instance; what it reaches cannot be read off the class
    inside = list(module.modules())
    known = tree | {id(m) for m in inside}
    stored = [value for value in _stored(vars(module).values(), _DEPTH) if id(value) not in known]
    held = {type(value) for value in (*inside, *stored)}
    cls: Any = type(module)
    if _reaches([(value, None) for value in stored], frozenset()):
        return True
    return _class_reaches(cls, cls.forward, frozenset(c for c in held if not _is_torch(c) and c is not cls))


def forward_names(module: nn.Module) -> frozenset[str]:
    """Every name that the code of the module's forward mentions (not what it calls)."""
    code = getattr(type(module).forward, "__code__", None)
    return _names_and_strings(code)[0] if code is not None else frozenset()


@functools.cache
def _class_reaches(cls: type, forward: Any, held: frozenset[type]) -> bool:
    return _reaches([(forward, cls)], held)


def _stored(values: Any, depth: int, seen: set[int] | None = None) -> Iterator[Any]:
    """Functions, plain objects and modules among some values, and in the containers and plain objects among them."""
    seen = set() if seen is None else seen
    for value in list(values):  # looking at a lazy one may fill the dictionary that it lies in
        if _is_code(value) or isinstance(value, nn.Module):
            yield value
        elif isinstance(value, _CONTAINERS):
            if depth and id(value) not in seen:
                seen.add(id(value))
                yield from _stored(value.values() if hasattr(value, "values") else value, depth - 1, seen)
        elif not isinstance(value, (type, *_PLAIN)) and type(value).__module__ != "builtins":
            yield value
            simple = isinstance(value, types.SimpleNamespace) or not _is_standard(type(value))
            if depth and simple and id(value) not in seen and not _is_torch(type(value)):
                seen.add(id(value))
                yield from _stored(getattr(value, "__dict__", {}).values(), depth - 1, seen)


def _is_code(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType))


def _reaches(todo: list[_Reached], held: frozenset[type]) -> bool:
    """Whether any of these values is, or can come to call, a convolution function."""
    seen: set[Any] = set()
    expanded: set[int] = set()
    met: dict[tuple[int, type | None], Any] = {}  # kept: what lives no longer could share its identity with another value
    while todo:
        value, cls = todo.pop()
        if isinstance(value, _PLAIN) or (id(value), cls) in met:
            continue
        met[id(value), cls] = value
        if isinstance(value, _CONTAINERS):
            todo += [(item, cls) for item in _stored([value], _DEPTH, expanded)]
        elif isinstance(value, (functools.partial, functools.partialmethod)):
            todo += [(v, cls) for v in (value.func, *value.args, *value.keywords.values())]
        elif isinstance(value, types.MethodType):
            todo.append((value.__func__, type(value.__self__)))
        elif isinstance(value, (staticmethod, classmethod)):
            todo.append((value.__func__, cls))
        elif isinstance(value, types.BuiltinFunctionType):
            if value in SPEC_OF_FUNCTION or value.__name__ in _NAMES:
                return True
        elif isinstance(value, types.FunctionType):
            if (value.__code__, cls) not in seen and not _is_foreign(value):
                seen.add((value.__code__, cls))
                if _mentions_convolution(value, cls):
                    return True
                todo += [(v, cls) for v in getattr(value, "registry", {}).values()]  # of functools.singledispatch
                todo += _successors(value, cls, held)
        elif isinstance(value, nn.Module):  # one that is no part of the model
            if any(spec_of_module(m) is not None for m in value.modules()):
                return True
            todo += [(type(m).forward, type(m)) for m in value.modules()]
        elif isinstance(value, type):
            if issubclass(value, nn.Module) and value not in held:  # made in the forward, it may be
                todo += [(value.forward, value), (value.__init__, value)]
        elif value.__class__ is torch._ops.OpOverload or value.__class__ is torch._ops.OpOverloadPacket:
            if value in GENERAL or any(str(value).startswith(f"aten.{name}") for name in _NAMES):
                return True
        elif isinstance(wrapped := inspect.getattr_static(value, "__wrapped__", None), types.FunctionType):
            todo.append((wrapped, cls))
        elif isinstance(value, functools.cached_property):
            todo.append((value.func, cls))
        elif not isinstance(value, torch.Tensor) and not _is_torch(type(value)):
            todo += [(v, type(value)) for v in _implicit(type(value))]
            todo += [(item, None) for item in _stored([value], _DEPTH, expanded) if item is not value]
    return False


def _implicit(cls: type) -> Iterator[types.FunctionType]:
    """The methods of a plain object that code calls without their names: operators, indexing, ``with``, calls."""
    for klass in cls.__mro__:
        if not _is_standard(klass):
            found = (v for n, v in vars(klass).items() if n in _IMPLICIT)
            yield from (v for v in found if isinstance(v, types.FunctionType))


def _is_standard(value: Any) -> bool:
    """Whether a class or function is of the standard library."""
    return (value.__module__ or "").partition(".")[0] in sys.stdlib_module_names


def _mentions_convolution(function: types.FunctionType, cls: type | None) -> bool:
    names, strings = _names_and_strings(function.__code__)
    called = names & _NAMES and _names_of_others(function.__code__) & _NAMES
    if called and not (called == {"_conv_forward"} and _is_conv_class(cls)):
        return True
    if names & _ANYTHING or names & _CLASSES:
        return True
    return "getattr" in names and (any(s.startswith("conv") for s in strings) or _looks_up_in_torch(function))


@functools.cache
def _names_of_others(code: types.CodeType) -> frozenset[str]:
    """The names that code mentions, but for attributes of its first argument: ``self.convolution`` is a layer or a method."""
    found: set[str] = set()
    before: Any = None
    for i in dis.get_instructions(code):
        if i.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if before is None or before != code.co_varnames[0]:
                found.add(i.argval)
            before = None
        elif i.opname.startswith("LOAD_FAST"):
            before = i.argval[-1] if isinstance(i.argval, tuple) else i.argval
        elif i.opname not in ("CACHE", "EXTENDED_ARG"):
            before = None
            if isinstance(i.argval, str):
                found.add(i.argval)
    inner = (_names_of_others(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return frozenset(found.union(*inner))


@functools.cache
def _lookups(code: types.CodeType) -> frozenset[tuple[str, str]]:
    """What ``getattr`` is asked in code: the name of the object, and what that of the attribute begins with."""
    loads: list[tuple[bool, Any]] = []  # whether it is a constant, and its value or name
    for i in dis.get_instructions(code):
        if i.opname.startswith("LOAD_"):
            loads += [(i.opname == "LOAD_CONST", v) for v in (i.argval if isinstance(i.argval, tuple) else (i.argval,))]
    found = {
        (thing, name if constant and isinstance(name, str) else "")
        for (_, function), (_, thing), (constant, name) in zip(loads, loads[1:], [*loads[2:], (False, "")], strict=False)
        if function == "getattr" and isinstance(thing, str)
    }
    return frozenset(found.union(*(_lookups(const) for const in code.co_consts if isinstance(const, types.CodeType))))


def _looks_up_in_torch(function: types.FunctionType) -> bool:
    """Whether the code says ``getattr(F, …)``, with a module of torch for ``F``."""
    found = (function.__globals__.get(thing) for thing, _ in _lookups(function.__code__))
    return any(isinstance(f, types.ModuleType) and f.__name__.partition(".")[0] == "torch" for f in found)


def _looked_up_in_self(function: types.FunctionType, cls: type) -> Iterator[Any]:
    """What ``getattr(self, …)`` in the code may give: whatever in a user's class begins as the name there does."""
    code = function.__code__
    if "getattr" in _names_and_strings(code)[0] and code.co_varnames:
        for thing, start in _lookups(code):
            if thing == code.co_varnames[0]:
                yield from _own_members(cls, start)


def _successors(function: types.FunctionType, cls: type | None, held: frozenset[type]) -> Iterator[_Reached]:
    """What a function may call, each with the class that it is a member of."""
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            values.append(cell.cell_contents)
    yield from ((value, cls) for value in values)
    names, _ = _names_and_strings(function.__code__)
    for name in names:
        yield from _resolve(name, function, cls, names, held)
    if cls is not None:
        yield from ((value, cls) for value in _looked_up_in_self(function, cls))


def _resolve(
    name: str, function: types.FunctionType, cls: type | None, names: frozenset[str], held: frozenset[type]
) -> Iterator[_Reached]:
    found = function.__globals__.get(name)
    if found is None:  # imported inside the function, it may be
        found = sys.modules.get(name) or sys.modules.get(f"{(function.__module__ or '').rpartition('.')[0]}.{name}")
    if isinstance(found, types.ModuleType):
        if not found.__name__.startswith("torch.") and found.__name__ != "torch":
            for n in names & vars(found).keys():  # asking for others would import what a lazy module has not loaded yet
                yield from _global(vars(found)[n], cls, names)
    elif found is not None:
        yield from _global(found, cls, names)
    if cls is not None:
        yield from ((member, cls) for member in _members(cls, name))
    if name not in ("forward", "__init__"):  # a module's own forward is a matter of its own
        yield from ((member, other) for other in held for member in _members(other, name))


def _global(value: Any, cls: type | None, names: frozenset[str]) -> Iterator[_Reached]:
    """What a value that a function knows by name may lead to; ``names`` are those that the function mentions."""
    if isinstance(value, _CONTAINERS):
        yield value, cls
    elif isinstance(value, type) and issubclass(value, torch.autograd.Function):
        # its forward runs without gradients, unless it turns them on
        forwards = (f.__func__ if isinstance(f, staticmethod) else f for f in _members(value, "forward"))
        yield from ((f, value) for f in forwards if _turns_gradients_on(f))
    elif isinstance(value, type) and not issubclass(value, nn.Module):
        if not _is_torch(value):
            yield from ((v, value) for n in (*names, "__init__") for v in _members(value, n))
            yield from ((v, value) for v in _implicit(value))
    elif value is not None and not isinstance(value, types.ModuleType):
        yield value, cls
        if not _is_code(value) and not isinstance(value, (nn.Module, type)) and not _is_torch(type(value)):
            yield from ((v, type(value)) for n in names for v in _members(type(value), n))


def _turns_gradients_on(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and bool(_names_and_strings(code)[0] & {"enable_grad", "set_grad_enabled"})


def _own_members(cls: type, start: str) -> Iterator[Any]:
    """What a user's class and its bases have under names with that start, but for what makes an instance and the forward."""
    for klass in cls.__mro__:
        if not _is_torch(klass) and klass.__module__.partition(".")[0] not in sys.stdlib_module_names:
            for name, value in vars(klass).items():
                if name.startswith(start) and name not in ("forward", "__init__"):
                    yield value.fget if isinstance(value, property) else value


def _members(cls: type, name: str) -> Iterator[Any]:
    for klass in cls.__mro__:
        if klass is not nn.Module and name in vars(klass):
            value = vars(klass)[name]
            yield value.fget if isinstance(value, property) else value


@functools.cache
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


def _is_foreign(function: types.FunctionType) -> bool:
    """Whether nothing of interest is behind a function of the standard library, or of torch: its own modules and functionals
    call a convolution only through ``_conv_forward``.
    """
    return _is_torch(function) or _is_standard(function)


def _is_conv_class(cls: type | None) -> bool:
    return cls is not None and issubclass(cls, nn.modules.conv._ConvNd)


__all__ = ["forward_names", "may_call_convolution"]
