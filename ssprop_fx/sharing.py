"""A copy of a module tree that shares every tensor with the original."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from .references import FUNCTIONS, SEQUENCES, Cached, attributes, contents, dict_of, held_in, in_slots, is_proxy, reachable

logger = logging.getLogger(__name__)

_CONTAINERS = (dict, *SEQUENCES, functools.partial, types.MethodType)
_HOOKS = frozenset(key for key in vars(nn.Module()) if key.endswith("_hooks"))

_deep_copies: Any = copy  # with names that it has in some versions only
_redirecting = threading.RLock()


@contextlib.contextmanager
def _memo_of_all() -> Iterator[None]:
    """While active, a deep copy looks into its memo for functions and weak references, too, as it does before Python 3.14."""
    if not hasattr(_deep_copies, "_atomic_types"):
        yield
        return
    kinds = (types.FunctionType, weakref.ref)
    with _redirecting:
        atomic = _deep_copies._atomic_types
        for kind in kinds:  # they stay: another thread may be copying
            _deep_copies._deepcopy_dispatch.setdefault(kind, lambda value, memo: value)
        _deep_copies._atomic_types = atomic.difference(kinds)
        try:
            yield
        finally:
            _deep_copies._atomic_types = atomic


class _KeepTensors(TorchFunctionMode):
    """While active, a deep copy of a tensor is the tensor itself (non-leaf ones could not be copied at all)."""

    def __init__(self, tensor_copy: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.tensor_copy = tensor_copy

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__:
            return self.tensor_copy(args[0])
        return func(*args, **(kwargs or {}))


def shared_copy(
    model: nn.Module,
    tensor_copy: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    share_listeners: bool = True,
    shared: Iterable[Any] = (),
) -> nn.Module:
    """Copy the modules of ``model``, not its tensors.

    Every module becomes a new object of the same class (a ``torch.fx.GraphModule`` or a parametrized layer, of a class of its
    own, as each has); parameters, buffers and other tensors, those of modules in plain containers included, are the same
    objects in both. Attributes, hooks, bound methods, closures and weak references that refer to modules of the tree refer
    to the copies.
    What cannot be copied (a lock, an open file, a process group) is shared, and so are bare objects, which code compares
    with ``is``, what weak references and proxies stand for outside of the tree, and scripted modules, which are opaque to
    Python.

    Args:
        tensor_copy: what a tensor becomes in the copy; by default the tensor itself.
        share_listeners: whether an object that only a hook refers to (it collects features, say) is the same in both, or is
            copied, too, so that it does not hear what the copy does.
        shared: further objects that are the same in both.
    """
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    tree = {id(m) for m in modules}
    memo: dict[int, Any] = {id(m): m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)}
    everything = list(reachable([model], proxies=True))
    found = [value for value in everything if not is_proxy(value)]
    memo |= {id(value): tensor_copy(value) for value in found if isinstance(value, Tensor)}
    memo |= {id(value): value for value in shared}
    memo |= {id(value): value for value in found if type(value) is object}  # known by its identity, and by nothing else
    memo |= {id(module): _empty(module) for module in modules}
    memo |= _proxies(everything, modules, memo)
    tables = [value for module in modules for key, value in vars(module).items() if key in _HOOKS]
    memo |= {id(table): type(table)() for table in tables}  # filled last: a handle leads to one and must not copy what is in it
    with _KeepTensors(tensor_copy), _memo_of_all():
        _redirect(found, modules, memo, share_listeners)
        for hooks in (False, True):  # an object that an attribute refers to, too, is copied with that
            for module in modules:
                state = vars(memo[id(module)])
                for key, value in vars(module).items():
                    if key == "_compiled_call_impl" or (key in _HOOKS) != hooks:  # the first is of compiled code
                        continue
                    name = f"{type(module).__name__}.{key}"
                    state[key] = _copied(value, memo, tree, name, share_listeners)
                    if hooks:
                        if share_listeners:
                            _share_listeners(value.values(), memo)
                        state[key].update({i: _copied(hook, memo, tree, name, share_listeners) for i, hook in value.items()})
    for module in modules:
        for name, value in in_slots(module).items():
            key = f"{type(module).__name__}.{name}"
            object.__setattr__(memo[id(module)], name, _copied(value, memo, tree, key, share_listeners))
    for module in modules:
        if isinstance(module, torch.fx.GraphModule):
            memo[id(module)].graph.owning_module = memo[id(module)]
    _join_entries_and_attributes(found, memo)
    _map_weak_dictionaries(found, memo)
    _part_classes(found, memo)
    for module in modules:  # in the order that the original has them
        state = vars(memo[id(module)])
        for key in vars(module):
            if key in state:
                state[key] = state.pop(key)
    return memo[id(model)]


def _empty(module: nn.Module) -> nn.Module:
    """A module of the same class without any state; a graph of ``torch.fx`` gets a class of its own, which holds its code."""
    cls: Any = type(module)
    if isinstance(module, torch.fx.GraphModule):
        new: Any = torch.fx.GraphModule.__new__(cls)
        type(new).__name__, type(new).forward = cls.__name__, cls.forward
        return new
    return cls.__new__(cls) if cls.__new__ is object.__new__ else object.__new__(cls)


def _copied(value: Any, memo: dict[int, Any], tree: set[int], name: str, warn: bool) -> Any:
    if is_proxy(value) or isinstance(value, weakref.ref):  # of a subclass it could not be copied
        return memo.get(id(value), value)
    known = len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever __deepcopy__ or __reduce__ of foreign objects raise
        _forget(memo, known)
        for leaf in reachable([value]):
            known_or_inner = id(leaf) in memo or isinstance(leaf, _CONTAINERS)
            if not known_or_inner and not _copies(leaf) and not _names(leaf, tree, objects=True):
                memo[id(leaf)] = leaf
    known = len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception as problem:
        _forget(memo, known)
        if isinstance(value, functools.partial):
            func, *args = (_copied(part, memo, tree, name, warn) for part in (value.func, *value.args))
            return type(value)(func, *args, **{k: _copied(v, memo, tree, name, warn) for k, v in value.keywords.items()})
        held = any(id(found) in tree for found in reachable([value]))
        level = logging.WARNING if held and warn else logging.DEBUG
        logger.log(
            level,
            "%s is shared, not copied%s: %r",
            name,
            ", and what it calls of the model is the original, untransformed" if held else "",
            problem,
        )
        return value


def _join_entries_and_attributes(found: Iterable[Any], memo: dict[int, Any]) -> None:
    """Where a dictionary's entries are its attributes, ``self.__dict__ = self``, make them so in its copy."""
    for value in found:
        new = memo.get(id(value), value)
        if isinstance(value, dict) and dict_of(value) is value and new is not value and type(new) is type(value):
            object.__setattr__(new, "__dict__", new)


def _map_weak_dictionaries(found: Iterable[Any], memo: dict[int, Any]) -> None:
    """Put the copies into copied weak dictionaries, which keep what they refer to weakly when they are copied."""
    for value in found:
        new = memo.get(id(value), value)
        if new is not value and isinstance(new, (weakref.WeakKeyDictionary, weakref.WeakValueDictionary)):
            entries = [(memo.get(id(k), k), memo.get(id(v), v)) for k, v in new.items()]
            new.clear()
            new.update(entries)


def _part_classes(found: Iterable[Any], memo: dict[int, Any]) -> None:
    """Give copies of parametrized layers classes of their own: a parametrization comes and goes as a property of the class."""
    for value in found:
        cls: Any = type(value)
        new = memo.get(id(value), value)
        if new is not value and cls.__module__ == parametrize.__name__ and parametrize.is_parametrized(value):
            new.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))


def _proxies(found: Iterable[Any], modules: Iterable[nn.Module], memo: dict[int, Any]) -> dict[int, Any]:
    """What stands for the proxies in the copy, by id: for those of modules, proxies of their copies; the others stay."""
    of_module = {id(ref): memo[id(module)] for module in modules for ref in weakref.getweakrefs(module)}
    proxies = filter(is_proxy, found)
    return {id(p): weakref.proxy(of_module[id(p)]) if id(p) in of_module else p for p in proxies}


def _forget(memo: dict[int, Any], known: int) -> None:
    """Take the halves of a copy that failed, all but the first ``known`` entries, out of the memo."""
    for key in list(memo)[known:]:
        if key != id(memo):  # where a deep copy keeps alive what it has met
            del memo[key]


def _copies(leaf: Any) -> bool:
    """Whether an object copies if everything does that it has in its attributes; what a copy's end would end does not."""
    if hasattr(type(leaf), "__del__"):
        return False
    try:
        copy.deepcopy(leaf, {id(value): value for value in attributes(leaf)})
    except Exception:
        return False
    return True


def _redirect(found: Iterable[Any], modules: list[nn.Module], memo: dict[int, Any], warn: bool) -> None:
    """Put functions and weak references into the memo that refer to the copies where the originals refer to the tree.

    A function that an attribute leads to may come to the tree through objects as well: these are copied for it. What the
    functions of hooks hold is their user's, and stays.
    """
    tree = set(map(id, modules))
    for ref in found:
        if isinstance(ref, weakref.ref) and id(ref()) in tree:
            memo[id(ref)] = weakref.ref(memo[id(ref())])
    functions: list[Any] = [f for f in found if isinstance(f, FUNCTIONS)]
    functions = [f for f in functions if any(_names(c, tree, objects=True) for c in contents(f))]
    if not functions:
        return
    kept = (v for m in modules for k, v in [*vars(m).items(), *in_slots(m).items()] if k not in _HOOKS)
    attached = {id(value) for value in reachable(kept, beyond=tree)}
    functions = [f for f in functions if id(f) in attached or any(_names(c, tree) for c in contents(f))]
    functions.sort(key=lambda f: id(f) not in attached)  # these first: what they have copied, the others have, too
    others = {id(f): _copier(f, memo, tree, warn) if id(f) in attached else _same for f in functions}
    plain = [f for f in functions if isinstance(f, types.FunctionType)]
    cells: list[tuple[Any, Any, Callable[[Any], Any]]] = []
    for f in plain:
        closure = []
        for cell in f.__closure__ or ():
            if id(cell) not in memo and _names(held_in(cell), tree, objects=id(f) in attached):
                memo[id(cell)] = types.CellType()
                cells.append((memo[id(cell)], cell, others[id(f)]))
            closure.append(memo.get(id(cell), cell))
        new = types.FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, tuple(closure) or None)
        new.__kwdefaults__, new.__qualname__, new.__module__ = f.__kwdefaults__, f.__qualname__, f.__module__
        new.__dict__.update(f.__dict__)
        memo[id(f)] = new
    for f in functions:
        if isinstance(f, Cached):
            memo[id(f)] = functools.lru_cache(**f.cache_parameters())(_replaced(f.__wrapped__, memo, others[id(f)]))
    for new_cell, cell, other in cells:
        new_cell.cell_contents = _replaced(cell.cell_contents, memo, other)
    for f in plain:
        new = memo[id(f)]
        new.__defaults__ = _replaced(f.__defaults__, memo, others[id(f)])
        new.__kwdefaults__ = _replaced(f.__kwdefaults__, memo, others[id(f)])


def _names(value: Any, tree: set[int], objects: bool = False) -> bool:
    """Whether a value is a module of the tree, a method of one, or a plain container or function that holds one.

    Args:
        objects: or any other object that leads to one.
    """
    return any(id(found) in tree for found in reachable([value], objects=objects))


def _same(value: Any) -> Any:
    return value


def _copier(function: Any, memo: dict[int, Any], tree: set[int], warn: bool) -> Callable[[Any], Any]:
    """What becomes of the objects that a function refers to: those that lead to the tree are copied."""
    name = f"what {function.__qualname__} refers to"
    return lambda value: _copied(value, memo, tree, name, warn) if _names(value, tree, objects=True) else value


def _replaced(value: Any, memo: dict[int, Any], other: Callable[[Any], Any]) -> Any:
    """The value with the copies in place of the modules that it names, and with what ``other`` makes of all else."""
    if id(value) in memo:
        return memo[id(value)]
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(_replaced(v, memo, other) for v in value)
    if type(value) is dict:
        return {k: _replaced(v, memo, other) for k, v in value.items()}
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _replaced(value.__self__, memo, other))
    if isinstance(value, functools.partial):
        func, args, keywords = (_replaced(v, memo, other) for v in (value.func, value.args, value.keywords))
        return type(value)(func, *args, **keywords)
    return other(value)


def _share_listeners(hooks: Iterable[Any], memo: dict[int, Any]) -> None:
    for hook in hooks:
        if isinstance(hook, types.MethodType):
            listeners: Iterable[Any] = (hook.__self__,)
        elif isinstance(hook, functools.partial):
            _share_listeners((hook.func,), memo)
            listeners = (*hook.args, *hook.keywords.values())
        elif hasattr(hook, "with_module"):  # PyTorch's wrapper of a state_dict hook, which knows its module
            _share_listeners((hook.hook,), memo)
            listeners = ()
        else:
            listeners = (hook,)
        for listener in listeners:
            if not isinstance(listener, (nn.Module, types.MethodType, functools.partial)):
                memo.setdefault(id(listener), listener)


__all__ = ["shared_copy"]
