"""One training step of any model, for measuring, and what it changed put back."""

from __future__ import annotations

import contextlib
import random
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ._compat import without_gradient_hooks
from .errors import SSPropError
from .references import reachable
from .schedule import clocks_put_back


@contextlib.contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Whatever a step does to the model's tensors, to gradients, random states and clocks is put back."""
    found = (value for value in reachable([model]) if isinstance(value, Tensor) and value.is_leaf and not value.is_meta)
    values = [(tensor, tensor.detach().clone()) for tensor in map(_once, found)]
    grads = [(p, p.grad) for p in model.parameters()]
    for p, _ in grads:
        p.grad = None
    try:
        with torch.random.fork_rng(), _python_random(), clocks_put_back(), without_gradient_hooks(p for p, _ in grads):
            yield
    finally:
        for p, grad in grads:
            p.grad = grad
        for tensor, value in values:
            if not _equal(tensor, value):
                _put_back(tensor, value)


@contextlib.contextmanager
def attributes_put_back(model: nn.Module) -> Iterator[None]:
    """Numbers, states and whatever else a forward binds to its modules' attributes are put back."""
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, values in before:
            for name in attributes.keys() - values.keys():
                del attributes[name]
            for name, value in values.items():
                if attributes.get(name, attributes) is not value:
                    attributes[name] = value


def _equal(tensor: Tensor, value: Tensor) -> bool:
    """Whether two tensors are known to be equal: sparse ones, nested ones and those of oneDNN cannot be compared."""
    try:
        return torch.equal(tensor, value)
    except Exception:  # of the dispatcher, or of a tensor's own class
        return False


def _put_back(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor its value again; not counted as a change, since a graph may have saved it."""
    if tensor.layout == torch.sparse_coo:  # a copy into ``tensor.data`` would give that, and not the tensor, new coordinates
        tensor.data = value
    else:
        tensor.data.copy_(value)


def _once(tensor: Tensor) -> Tensor:
    """A view of a tensor with each place in memory once, of an expanded one; of coordinates and values there is none."""
    if tensor.layout == torch.sparse_coo:
        return tensor
    tensor = tensor.detach()
    for dim, stride in enumerate(tensor.stride() if tensor.layout == torch.strided and not tensor.is_nested else ()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


@contextlib.contextmanager
def _python_random() -> Iterator[None]:
    """Python's and NumPy's random numbers, put back."""
    numpy, state = sys.modules.get("numpy"), random.getstate()
    numbers = numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numbers)


def training_step(model: nn.Module, example_inputs: Any) -> None:
    """Forward and backward pass, with :func:`scalar_loss` of the outputs.

    Raises:
        SSPropError: none of the outputs carries a gradient.
    """
    with torch.enable_grad():
        scalar_loss(call_model(model, example_inputs)).backward()


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """The model's outputs; a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    return model(*example_inputs) if isinstance(example_inputs, (tuple, list)) else model(example_inputs)


def device_of(model: nn.Module) -> torch.device:
    """That the model's first parameter is on; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def scalar_loss(outputs: Any) -> Tensor:
    """A loss for any model: the sum of the mean squares of its floating-point outputs.

    Raises:
        SSPropError: none of them carries a gradient.
    """
    wanted = [t for t in tensors_of(outputs) if t.is_floating_point() and t.requires_grad]
    if not wanted:
        raise SSPropError(
            "no output of the model carries a gradient, so there is no backward pass to measure; "
            "is the model in training mode, and does a parameter require a gradient?"
        )
    return torch.stack([t.float().square().mean() for t in wanted]).sum()


def tensors_of(outputs: Any) -> list[Tensor]:
    """The tensors of whatever a model returns: a tensor, containers, mappings, dataclass-like outputs."""
    return list(_tensors_of(outputs, {}))


def _tensors_of(outputs: Any, met: dict[int, Any]) -> Iterator[Tensor]:
    """As :func:`tensors_of`; objects that were ``met``, which may refer to each other, are looked into once."""
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in met and not isinstance(leaf, (type, types.ModuleType, nn.Module)):  # whose tensors are no outputs
            met[id(leaf)] = leaf
            held = leaf if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", {})
            for value in held.values():
                yield from _tensors_of(value, met)
