"""A copy of a module tree that shares every tensor with the original."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

logger = logging.getLogger(__name__)


class _KeepTensors(TorchFunctionMode):
    """While active, a deep copy of a tensor is the tensor itself (non-leaf ones could not be copied at all)."""

    def __init__(self, tensor_copy: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.tensor_copy = tensor_copy

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__:
            return self.tensor_copy(args[0])
        return func(*args, **(kwargs or {}))


def shared_copy(model: nn.Module, tensor_copy: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> nn.Module:
    """Copy the modules of ``model``, not its tensors.

    Every module becomes a new object of the same class; parameters, buffers and other tensors are the same objects in
    both. Attributes, hooks and bound methods that refer to modules of the tree refer to the copies. What cannot be
    copied (a lock, an open file, a process group) is shared, and so are scripted modules, which are opaque to Python.

    Args:
        tensor_copy: what a tensor becomes in the copy; by default the tensor itself.
    """
    memo: dict[int, Any] = {id(tensor): tensor_copy(tensor) for tensor in _tensors(model)}
    pairs: list[tuple[nn.Module, nn.Module]] = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            memo[id(module)] = module
            continue
        shell = type(module).__new__(type(module)) if _plain_new(module) else object.__new__(type(module))
        memo[id(module)] = shell
        pairs.append((module, shell))
    with _KeepTensors(tensor_copy):
        for module, shell in pairs:
            state: dict[str, Any] = {}
            for key, value in vars(module).items():
                if key == "_compiled_call_impl":  # belongs to the original's compiled code
                    continue
                try:
                    state[key] = copy.deepcopy(value, memo)
                except Exception as problem:  # whatever __deepcopy__ or __reduce__ of foreign objects raise
                    logger.debug("%s.%s is shared, not copied: %r", type(module).__name__, key, problem)
                    state[key] = value
            vars(shell).update(state)
    return memo[id(model)]


def _tensors(model: nn.Module) -> list[Tensor]:
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        for value in vars(module).values():
            items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
            found += [item for item in items if isinstance(item, Tensor)]
    return found


def _plain_new(module: nn.Module) -> bool:
    return type(module).__new__ is object.__new__
