"""Operators that a compiled graph on the CPU calls as they are.

A compiler would make of each a kernel of C++ to be compiled, for seconds, and one that runs no faster than PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._compat import functorch_active

_library = torch.library.Library("ssprop", "FRAGMENT")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """An operator of the namespace ``ssprop``.

    Args:
        schema: name, arguments and results.
        kernel: differentiable; autograd sees the operations inside.
        fake: results of the right shape, for fake tensors.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    # without it calls pass by autograd's fallback, which takes as long as they do
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"ssprop::{name}", fake, lib=_library)
    return getattr(torch.ops.ssprop, name).default


def wanted(tensor: Tensor, compiling: bool) -> bool:
    """Whether a compiler is to see an operator instead of the operations inside it, which ``torch.func`` has to see."""
    return compiling and tensor.device.type == "cpu" and not functorch_active()


def shaped(likes: Sequence[Tensor], mask: Sequence[bool]) -> tuple[Tensor, ...]:
    """Results of an operator whose kernel gives what ``mask`` names: tensors as ``likes``, empty ones for the others."""
    return tuple(torch.empty_like(t) if wanted else t.new_empty((0,)) for t, wanted in zip(likes, mask, strict=True))


def laid_out(results: Sequence[Tensor | None], likes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results, dense tensors or None, in the layout that :func:`shaped` has promised."""
    return tuple(_as(r, like) for r, like in zip(results, likes, strict=True))


def _as(result: Tensor | None, like: Tensor) -> Tensor:
    if result is None:
        return like.new_empty((0,))
    return result if result.stride() == like.stride() else torch.empty_like(like).copy_(result)
