"""What passes over an aten graph have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ssprop_fx._compat import fake_mode_of


def call_in_place_of(replaced: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call with the metadata of the node that it replaces, or helps to, and a value of its own."""
    made = replaced.graph.call_function(target, args, kwargs)
    made.meta = dict(replaced.meta)
    values, named = torch.fx.node.map_arg((args, kwargs), lambda node: node.meta["val"])
    with fake_mode_of([replaced.meta["val"]]):
        made.meta["val"] = target(*values, **named)
    return made


def has_static_shape(tensor: torch.Tensor) -> bool:
    """Whether every size is a number."""
    return all(isinstance(size, int) for size in tensor.shape)
