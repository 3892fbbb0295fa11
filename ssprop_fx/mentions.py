"""What the code of a function mentions: names and texts, what ``getattr`` is asked for, what it imports when it runs."""

from __future__ import annotations

import dis
import functools
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_IMPORT = dis.opmap["IMPORT_NAME"]


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of what is defined in there: functions, lambdas, comprehensions."""
    return (const for const in code.co_consts if isinstance(const, types.CodeType))


@functools.cache
def names_and_strings(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The names that code mentions, those of attributes included, and its texts."""
    names: set[str] = set(code.co_names)
    strings: set[str] = {const for const in code.co_consts if isinstance(const, str)}
    for inner in _inner(code):
        inner_names, inner_strings = names_and_strings(inner)
        names |= inner_names
        strings |= inner_strings
    return frozenset(names), frozenset(strings)


@functools.cache
def names_of_others(code: types.CodeType) -> frozenset[str]:
    """The names that code mentions, but for attributes of its first argument: ``self.convolution`` is a layer or a method."""
    found: set[str] = set()
    before = None
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
    return frozenset(found.union(*map(names_of_others, _inner(code))))


@functools.cache
def calls_forward_of_a_class(code: types.CodeType) -> bool:
    """Whether code calls the forward of a layer's class, ``type(layer).forward(layer, x)`` or by ``layer.__class__``."""
    before = None
    for i in dis.get_instructions(code):
        if i.argval == "forward" and before is not None and _loads_method(i) and _gives_class(before):
            return True
        if i.opname not in ("CACHE", "EXTENDED_ARG"):
            before = i
    return any(map(calls_forward_of_a_class, _inner(code)))


def _gives_class(instruction: dis.Instruction) -> bool:
    """Whether an instruction may put a class in place: the attribute ``__class__``, or a call with one argument."""
    called = instruction.opname in ("CALL", "CALL_FUNCTION") and instruction.arg == 1
    return called or instruction.argval == "__class__"


def _loads_method(instruction: dis.Instruction) -> bool:
    """Whether an attribute is loaded to be called at once; newer Pythons say so in the lowest bit."""
    newer = sys.version_info >= (3, 12) and instruction.opname == "LOAD_ATTR"
    return bool(newer and (instruction.arg or 0) & 1) or instruction.opname == "LOAD_METHOD"


@functools.cache
def lookups(code: types.CodeType) -> frozenset[tuple[str, str]]:
    """What ``getattr`` is asked in code: the name of the object, and what that of the attribute begins with."""
    loads: list[tuple[bool, object]] = []  # whether it is a constant, and its value or name
    for i in dis.get_instructions(code):
        if i.opname.startswith("LOAD_"):
            loads += [(i.opname == "LOAD_CONST", v) for v in (i.argval if isinstance(i.argval, tuple) else (i.argval,))]
    found = {
        (thing, name if constant and isinstance(name, str) else "")
        for (_, function), (_, thing), (constant, name) in zip(loads, loads[1:], [*loads[2:], (False, "")], strict=False)
        if function == "getattr" and isinstance(thing, str)
    }
    return frozenset(found.union(*map(lookups, _inner(code))))


@functools.cache
def _imports(code: types.CodeType) -> frozenset[tuple[int, str, tuple[str, ...]]]:
    """Import statements: how many packages up, the module's name, and the names taken from it."""
    found: set[tuple[int, str, tuple[str, ...]]] = set()
    if _IMPORT in code.co_code[::2]:
        constants: list = []
        for i in dis.get_instructions(code):
            if i.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
                constants.append(i.argval)
            elif i.opname == "IMPORT_NAME":
                level, taken = constants[-2:]
                found.add((level, i.argval, taken or ()))
    return frozenset(found.union(*map(_imports, _inner(code))))


def imported(function: types.FunctionType, loaded: bool = False) -> Iterator[Any]:
    """What a function imports when it runs, torch and the standard library left out.

    Args:
        loaded: leave out what is not loaded yet.

    Yields:
        Modules, and what is taken from modules. Of a module that is not loaded yet, a function that has its code;
        ``NotImplemented`` for what a module makes when it is asked for. What is not installed is left out: whoever imports it
        gets an error.
    """
    for level, name, taken in _imports(function.__code__):
        if level:
            try:
                name = importlib.util.resolve_name("." * level + name, function.__globals__.get("__package__") or "")
            except ImportError:
                continue
        if is_library(name):
            continue
        module = sys.modules.get(name)
        if module is None and loaded:
            continue
        if module is None:
            yield from filter(None, map(_not_loaded, (name, *(f"{name}.{inner}" for inner in taken))))
        elif not taken:  # ``import a.b`` gives a name to ``a``, and ``import a.b as c`` to ``a.b``
            yield from (sys.modules.get(package(name)), module)
        for inner in taken if module is not None else ():
            if inner in vars(module):
                yield vars(module)[inner]
            elif (submodule := sys.modules.get(f"{name}.{inner}")) is not None:
                yield submodule
            elif not loaded and inner[:2] != "__":
                yield _not_loaded(f"{name}.{inner}") or NotImplemented


@functools.lru_cache(maxsize=1024)
def _not_loaded(name: str) -> types.FunctionType | None:
    """The code of a module as a function, found without loading anything; None if there is none."""
    spec, path = None, None
    for end in (i for i, c in enumerate(f"{name}.") if c == "."):
        loaded = sys.modules.get(name[:end])
        if loaded is not None:
            path = vars(loaded).get("__path__")
        else:
            spec = _spec(name[:end], path)
            path = _folders(name[:end], path) if spec is None else spec.submodule_search_locations
        if path is None and (spec is None or end < len(name)):  # without a path, finders look for what is outermost
            return None
    try:
        code = spec.loader.get_code(name)  # type: ignore[union-attr]
    except (AttributeError, ImportError, SyntaxError):  # it is no Python
        return None
    return code and types.FunctionType(code, {"__name__": name, "__package__": spec.parent})  # type: ignore[union-attr]


def _spec(name: str, path: Sequence[str] | None) -> importlib.machinery.ModuleSpec | None:
    """What the finders say of a module; nothing where they want its package loaded, as Python's does of a namespace."""
    finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
    try:
        return next(filter(None, (find(name, path, None) for find in finders if find)), None)
    except (ImportError, KeyError):
        return None


def _folders(name: str, path: Sequence[str] | None) -> list[str] | None:
    """Where modules of a namespace within a package may be: folders of its name."""
    folders = [Path(entry, name.rpartition(".")[2]) for entry in path or ()]
    return [str(folder) for folder in folders if folder.is_dir()] or None


def is_library(module: str | None) -> bool:
    """Whether a module, by its name, is of torch or of the standard library."""
    return package(module) == "torch" or package(module) in sys.stdlib_module_names


def package(module: str | None) -> str:
    """The outermost package of a module, by its name."""
    return (module or "").partition(".")[0]


__all__ = ["calls_forward_of_a_class", "imported", "is_library", "lookups", "names_and_strings", "names_of_others", "package"]
