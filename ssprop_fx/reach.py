"""Whether a module's forward could call a convolution function: read off the code, before anything runs.

:func:`may_call_convolution` follows what the forward mentions by name: functions of its module and of others, methods of the
modules and of the plain objects that it holds, what lies in tables, defaults and closures. When it cannot tell, it says yes,
which costs time and never an answer.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Iterable, Iterator, Set
from typing import Any

import torch
from torch import nn

from .convolutions import GENERAL, SPEC_OF_FUNCTION, spec_of_module
from .mentions import calls_forward_of_a_class, imported, is_library, lookups, names_and_strings, names_of_others, package
from .references import attributes, is_gone

Known = dict[tuple[type, frozenset[Any], bool], bool]  # a class and what its module holds → whether that calls a convolution
_Reached = tuple[Any, "type | None"]  # a value, and the class that it is a member of

# Whoever mentions one of these may call a convolution, or anything.
_NAMES = frozenset(spec.name for spec in SPEC_OF_FUNCTION.values()) | {"_conv_forward", "convolution", "_convolution"}
_CLASSES = frozenset(spec.module.__name__ for spec in SPEC_OF_FUNCTION.values())
_ANYTHING = frozenset({"eval", "exec", "attrgetter", "methodcaller"})

_OPERATORS = ("add", "sub", "mul", "matmul", "truediv", "pow", "mod", "and", "or", "xor", "lshift", "rshift")
_IMPLICIT = frozenset(
    [f"__{prefix}{name}__" for name in _OPERATORS for prefix in ("", "r", "i")]
    + ["__call__", "__enter__", "__exit__", "__get__", "__getattr__", "__getitem__", "__iter__", "__next__", "__neg__"]
)
_PLAIN = (str, bytes, int, float, complex, type(None), type(...), torch.dtype, torch.device, torch.Tensor)  # lead nowhere

_TABLES = (dict, types.MappingProxyType)
_CONTAINERS = (list, tuple, set, frozenset, *_TABLES)
_DEPTH = 8  # of plain objects and containers within each other


def may_call_convolution(
    module: nn.Module, tree: Set[int] = frozenset(), classes: frozenset[type] = frozenset(), known: Known | None = None
) -> bool:
    """Whether the module's own forward or a hook of it (not its children's) could call a convolution function.

    A convolution module that computes through ``self._conv_forward`` does not count: that call is its own.

    Args:
        tree: ids of all modules of the model, which are looked at one by one; other modules that this one refers to belong
            to it.
        classes: of those modules (:func:`classes_of`). One may call a method of any other: it gets that as an argument, or
            holds it, or its parent, where nothing is registered.
        known: what was found out about classes before, in the same call of the library and no other: between two of them a
            notebook's cell may be run again, and a function that code mentions be another.
    """
    if "forward" in vars(module):
        return True  # somebody replaced it on the instance; what it reaches cannot be read off the class
    tree = tree or {id(m) for m in module.modules()}
    kept = list(_stored([value for value in attributes(module) if value is not module._modules], _DEPTH))
    stored = [value for value in kept if id(value) not in tree]
    holds = len(stored) < len(kept)
    spaces = frozenset(value for value in stored if _is_space(value))
    objects = [value for value in stored if not _is_space(value)]
    held = {cls for value in (module, *objects) for cls in _classes(value)}
    cls: Any = type(module)
    if _reaches([(value, None) for value in objects], spaces) or any(hooks_that_may_call(module, classes)):
        return True
    known = {} if known is None else known
    key = cls, frozenset(held - {cls}) | spaces, holds
    if key not in known:
        known[key] = _class_reaches(*key, classes)
    return known[key]


def hooks_that_may_call(module: nn.Module, classes: frozenset[type] = frozenset()) -> Iterator[tuple[dict[int, Any], int]]:
    """Forward hooks and pre-hooks that could call a convolution function: the table that one is in, and its key.

    Args:
        classes: as for :func:`may_call_convolution`.
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if _reaches([(hook, None)], frozenset(_classes(module)), classes):
                yield hooks, key


def forward_names(module: nn.Module) -> frozenset[str]:
    """Every name that the code of the module's forward mentions (not what it calls)."""
    code = getattr(type(module).forward, "__code__", None)
    return names_and_strings(code)[0] if code is not None else frozenset()


def _forward(cls: type) -> Any:
    """A class's forward as it is written there: a function, or what makes one, as ``functools.partialmethod`` does."""
    return next(_members(cls, "forward"), None)


def _class_reaches(cls: type, held: frozenset[Any], holds: bool, classes: frozenset[type]) -> bool:
    asked = [(f, c) for c in (cls, *held) for f in _members(c, "__getattr__")]
    return _reaches([(_forward(cls), cls), *asked], held, classes, holds)


def _stored(values: Any, depth: int, seen: set[int] | None = None) -> Iterator[Any]:
    """Functions, modules of both kinds, plain classes and objects among some values, and in what lies among them."""
    seen = set() if seen is None else seen
    for value in list(values):  # looking at a lazy one may fill the dictionary that it lies in
        if is_gone(value):
            continue
        if _is_code(value) or isinstance(value, nn.Module) or _is_space(value):
            yield value
        elif isinstance(value, weakref.ref):
            if isinstance(module := value(), nn.Module):
                yield module
        elif isinstance(value, _CONTAINERS):
            if depth and id(value) not in seen:
                seen.add(id(value))
                yield from _stored(value.values() if isinstance(value, _TABLES) else value, depth - 1, seen)
        elif not isinstance(value, (type, *_PLAIN)) and type(value).__module__ != "builtins":
            yield value
            simple = isinstance(value, types.SimpleNamespace) or not _is_standard(type(value))
            if depth and simple and id(value) not in seen and not _is_torch(type(value)):
                seen.add(id(value))
                yield from _stored(attributes(value), depth - 1, seen)


def classes_of(model: nn.Module) -> frozenset[type]:
    """The classes of a model's modules, those of a user's."""
    return frozenset(_classes(model))


def _classes(value: Any) -> Iterator[type]:
    """The class of an object, of a module those of its parts, as a user wrote it: torch parametrizes a class of its own."""
    for part in value.modules() if isinstance(value, nn.Module) else (value,):
        yield from [cls for cls in type(part).__mro__ if not is_library(cls.__module__)][:1]


def _is_space(value: Any) -> bool:
    """Whether a value is a Python module or a plain class of a user's: what is in there is called by name."""
    if isinstance(value, types.ModuleType):
        return not is_library(vars(value).get("__name__"))
    return isinstance(value, type) and not issubclass(value, nn.Module) and not is_library(value.__module__)


def _is_code(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType))


def _reaches(todo: list[_Reached], held: frozenset[Any], classes: frozenset[type] = frozenset(), holds: bool = False) -> bool:
    """Whether any of these values is, or can come to call, a convolution function.

    Args:
        held: classes of what the module holds, and Python modules and plain classes that it holds: whatever a method asks
            for by name may be in one of them.
        classes: of the modules of the model: a method of a module, or a function, may get any as an argument.
        holds: whether the module holds one of those where nothing is registered; then plain objects, of which far more is
            within reach than a forward asks for, may hold it, too.
    """
    every = held | classes
    near = every if holds else held
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
        elif isinstance(value, functools.singledispatchmethod):
            todo += [(v, cls) for v in value.dispatcher.registry.values()]
        elif isinstance(value, types.BuiltinFunctionType):
            if value in SPEC_OF_FUNCTION or value.__name__ in _NAMES:
                return True
        elif isinstance(value, types.FunctionType):
            if (value.__code__, cls) not in seen and not _is_foreign(value):
                seen.add((value.__code__, cls))
                if _mentions_convolution(value, cls):
                    return True
                registry = getattr(value, "registry", None)  # of functools.singledispatch
                todo += [(v, cls) for v in registry.values()] if isinstance(registry, _TABLES) else []
                todo += _successors(value, cls, near, every)
                todo += _looked_up(value, cls, near, every)
        elif isinstance(value, nn.Module):  # one that is no part of the model
            if any(spec_of_module(m) is not None for m in value.modules()):
                return True
            todo += [(_forward(type(m)), type(m)) for m in value.modules()]
        elif isinstance(value, types.ModuleType):
            if _is_space(value) and value not in held:
                return True  # it lies in a table, and what is called of it cannot be told
        elif isinstance(value, type):
            if issubclass(value, nn.Module) and value not in held:  # made in the forward, it may be
                todo += [(_forward(value), value), (value.__init__, value)]
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


def _mentions_convolution(function: types.FunctionType, cls: type | None) -> bool:
    names, strings = names_and_strings(function.__code__)
    if names & _NAMES and names_of_others(function.__code__) & _NAMES:
        return True
    if names & _ANYTHING or names & _CLASSES:
        return True
    if "forward" in names and names & {"type", "__class__"} and calls_forward_of_a_class(function.__code__):
        return True  # past the layer's own
    if any(value is NotImplemented for value in _imported(function, cls)):
        return True
    return "getattr" in names and (any(s.startswith("conv") for s in strings) or _looks_up_in_torch(function))


def _imported(function: types.FunctionType, cls: type | None) -> Iterator[Any]:
    """What a function imports; of a plain object, a configuration or a progress bar, only what is loaded.

    Far more of those is within reach than a forward asks for.
    """
    return imported(function, loaded=cls is not None and not issubclass(cls, nn.Module))


def _looks_up_in_torch(function: types.FunctionType) -> bool:
    """Whether the code says ``getattr(F, …)``, with a module of torch for ``F``."""
    found = (function.__globals__.get(thing) for thing, _ in lookups(function.__code__))
    return any(isinstance(f, types.ModuleType) and f.__name__.partition(".")[0] == "torch" for f in found)


def _looked_up(
    function: types.FunctionType, cls: type | None, held: frozenset[Any], every: frozenset[Any]
) -> Iterator[_Reached]:
    """What ``getattr(…, …)`` in the code may give: whatever begins as the name there does, in what it is asked of.

    That is the method's own class, a value that the function knows by name, or, in a method, what the module holds; where
    the name's beginning is known, any of ``every``.
    """
    code = function.__code__
    names, _ = names_and_strings(code)
    if "getattr" not in names:
        return
    for thing, start in lookups(code):
        known = function.__globals__.get(thing) if thing in names else None
        if known is not None:
            owners: Iterable[Any] = [known if isinstance(known, type) or _is_space(known) else type(known)]
        elif code.co_varnames and thing == code.co_varnames[0]:
            owners = [] if cls is None else [cls]
        else:
            own = cls is not None and issubclass(cls, nn.Module) and function in _members(cls, function.__name__)
            owners = (every if start else held) if own else []
        for owner in owners:
            for value in _own_members(owner, start):
                yield value, owner if isinstance(owner, type) else None


def _successors(
    function: types.FunctionType, cls: type | None, held: frozenset[Any], every: frozenset[Any]
) -> Iterator[_Reached]:
    """What a function may call, each with the class that it is a member of.

    Args:
        held: what it may ask for anything by name.
        every: further ones, which may be arguments of it: unless a tensor, too, has what it asks for.
    """
    given = every if cls is None or issubclass(cls, nn.Module) else held
    names, _ = names_and_strings(function.__code__)
    seen: set[int] = set()
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            values.append(cell.cell_contents)
    values += _imported(function, cls)
    values += [function.__globals__.get(name) for name in names]
    for value in values:
        yield from _named(value, cls, names, seen)
    for name in names:
        if cls is not None:
            yield from _members_named(cls, name, names, seen)
        if name not in ("forward", "__init__"):  # a module's own forward is a matter of its own
            for other in held if hasattr(torch.Tensor, name) else given:
                yield from _members_named(other, name, names, seen)


def _named(value: Any, cls: type | None, names: frozenset[str], seen: set[int]) -> Iterator[_Reached]:
    """What a value that a function knows by name may lead to.

    Args:
        names: those that the function mentions: of modules within modules, of attributes, of methods.
        seen: ids of what has been looked through for these names.
    """
    if value is None or isinstance(value, _PLAIN) or id(value) in seen:
        return
    if _is_code(value) or isinstance(value, _CONTAINERS):
        yield value, cls
        return
    seen.add(id(value))
    if isinstance(value, type) and issubclass(value, torch.autograd.Function):
        # its forward runs without gradients, unless it turns them on
        forwards = (f.__func__ if isinstance(f, staticmethod) else f for f in _members(value, "forward"))
        yield from ((f, value) for f in forwards if _turns_gradients_on(f))
    elif isinstance(value, types.ModuleType):
        if _is_space(value):
            for name in names:  # asking for what is not there would import what a lazy module has not loaded yet
                yield from _members_named(value, name, names, seen)
    elif isinstance(value, nn.Module) or (isinstance(value, type) and issubclass(value, nn.Module)):
        yield value, cls
        for owner in (value,) if isinstance(value, type) else set(_classes(value)):
            for name in names - {"forward", "__init__"}:  # as a module's own, those are looked at where it is
                yield from _members_named(owner, name, names, seen)
    elif isinstance(value, type):
        if not _is_torch(value):
            for name in (*names, "__init__"):
                yield from _members_named(value, name, names, seen)
            yield from ((v, value) for v in _implicit(value))
    else:
        yield value, cls
        if not _is_torch(type(value)):
            for name in names:
                yield from _members_named(type(value), name, names, seen)


def _members_named(owner: Any, name: str, names: frozenset[str], seen: set[int]) -> Iterator[_Reached]:
    for member in _members(owner, name):
        yield from _named(member, owner if isinstance(owner, type) else None, names, seen)


def _turns_gradients_on(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and bool(names_and_strings(code)[0] & {"enable_grad", "set_grad_enabled"})


def _own_members(owner: Any, start: str) -> Iterator[Any]:
    """What a user's class or a module has under names with that start, but for ``forward`` and ``__init__``."""
    for space in getattr(owner, "__mro__", (owner,)):
        if _is_space(space) or (isinstance(space, type) and not is_library(space.__module__)):
            for name, value in vars(space).items():
                if name.startswith(start) and name not in ("forward", "__init__"):
                    yield value.fget if isinstance(value, property) else value


def _members(owner: Any, name: str) -> Iterator[Any]:
    """What a class and its bases, or a module, have under a name; of a property, its function."""
    for space in owner.__mro__ if isinstance(owner, type) else (owner,):
        if space is not nn.Module and name in vars(space):
            value = vars(space)[name]
            yield value.fget if isinstance(value, property) else value


def _is_torch(value: Any) -> bool:
    return package(getattr(value, "__module__", None)) == "torch"


def _is_standard(value: Any) -> bool:
    """Whether a class or function is of the standard library."""
    return package(value.__module__) in sys.stdlib_module_names


def _is_foreign(function: types.FunctionType) -> bool:
    """Whether nothing of interest is behind a function of the standard library, or of torch: its own modules and functionals
    call a convolution only through ``_conv_forward``.
    """
    return is_library(function.__module__)


__all__ = ["Known", "classes_of", "forward_names", "hooks_that_may_call", "may_call_convolution"]
