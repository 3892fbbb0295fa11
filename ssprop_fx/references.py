"""What objects refer to: in attributes and slots, in containers, methods and closures."""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Set
from typing import Any, cast

import torch
from torch import Tensor, nn

SEQUENCES = (list, tuple, set, frozenset, deque)
Cached = type(functools.lru_cache(len))
FUNCTIONS = (types.FunctionType, Cached)
_LEAVES = (type, types.ModuleType, str, bytes, int, float, complex, type(None), *weakref.ProxyTypes)


def attributes(value: Any) -> list[Any]:
    """What an object keeps, in its ``__dict__`` or in slots; not in slots if it says itself what its state is, as a policy."""
    cls = cast(Any, type(value))
    kept = list(dict_of(value).values())
    return kept + list(in_slots(value).values()) if _slots(cls) and not _tells_state(cls) else kept


def dict_of(value: Any) -> dict[str, Any]:
    """The ``__dict__`` of an object, empty for one that has none."""
    try:  # not through a __getattr__ of its own, which may do, and raise, anything
        return object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        return {}


def _tells_state(cls: type) -> bool:
    told = getattr(cls, "__getstate__", None)
    return isinstance(told, types.FunctionType) and told.__module__ != "dataclasses" and not issubclass(cls, nn.Module)


def in_slots(value: Any) -> dict[str, Any]:
    """The attributes that an object keeps outside of its ``__dict__``, in slots that a Python class declares."""
    found, cls = {}, cast(Any, type(value))
    for name, slot in _slots(cls):
        with contextlib.suppress(AttributeError):  # an empty one
            found[name] = slot.__get__(value)
    return found


def _slots(cls: type) -> list[tuple[str, Any]]:
    found = []
    for klass in cls.__mro__:
        declared = vars(klass).get("__slots__", ())
        for name in (declared,) if isinstance(declared, str) else declared:
            if name not in ("__dict__", "__weakref__"):
                inner = f"_{klass.__name__.lstrip('_')}{name}" if name[:2] == "__" != name[-2:] else name
                if isinstance(vars(klass).get(inner), types.MemberDescriptorType):
                    found.append((inner, vars(klass)[inner]))
    return found


def is_proxy(value: Any) -> bool:
    """Whether a value is one of ``weakref.proxy``: asked for anything else, it answers for what it stands for, or raises."""
    return type(value) in weakref.ProxyTypes


def is_gone(value: Any) -> bool:
    """Whether a value is a proxy of an object that lives no longer."""
    try:
        return is_proxy(value) and not hasattr(value, "__class__")
    except ReferenceError:
        return True


def reachable(
    roots: Iterable[Any], objects: bool = True, proxies: bool = False, beyond: Set[int] = frozenset()
) -> Iterator[Any]:
    """What a deep copy would come to, and what functions have in their closures.

    Args:
        objects: look into modules and other objects, too, not only into containers, methods and functions.
        proxies: give weak proxies, too; what they stand for is not looked into.
        beyond: ids of further values that are not looked into.
    """
    stack, seen = deque(roots), set()
    keep = []  # what lives no longer could share its identity with another object
    while stack:
        value = stack.pop()
        if proxies and is_proxy(value):
            yield value
        if id(value) in seen or issubclass(type(value), _LEAVES):  # isinstance would ask a proxy for what it stands for
            continue
        seen.add(id(value))
        keep.append(value)
        yield value
        if isinstance(value, (Tensor, torch.jit.ScriptModule)) or id(value) in beyond:
            continue
        if isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, SEQUENCES):
            stack.extend(value)
        elif isinstance(value, functools.partial):
            stack.extend((value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            stack.append(value.__self__)
        elif isinstance(value, FUNCTIONS):
            stack.extend(contents(value))
        if objects and not isinstance(value, types.FunctionType):
            stack.extend(attributes(value))


def contents(function: Any) -> list[Any]:
    """What a function has in its closure and as defaults; the function that one with a cache has."""
    if isinstance(function, Cached):
        return [function.__wrapped__]
    cells = function.__closure__ or ()
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *map(held_in, cells)]


def held_in(cell: Any) -> Any:
    """What a closure's cell holds, None for an empty one."""
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None


__all__ = [
    "FUNCTIONS", "SEQUENCES", "Cached", "attributes", "contents", "dict_of", "held_in", "in_slots", "is_gone", "is_proxy",
    "reachable",
]  # fmt: skip
