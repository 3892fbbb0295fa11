"""What the options of ``torch.compile(model, backend="ssprop", options=…)`` stand for."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from ._compat import inductor_options
from .errors import SSPropError, nearest
from .policy import Policy
from .transform import as_policy

_lock = threading.Lock()
_resets = 0  # of Dynamo
_Read = dict[str, tuple[Policy, int]]  # by absolute path, or digest of a mapping; after how many resets it was read
_read: _Read = {}  # for graphs without a module
_read_for: weakref.WeakKeyDictionary[nn.Module, _Read] = weakref.WeakKeyDictionary()


def check_names(settings: Iterable[str]) -> None:
    """Refuse options that Inductor, which gets all but ours, does not have.

    Raises:
        SSPropError: with the nearest name.
    """
    for name in settings:
        if name.replace("-", "_") not in inductor_options():
            near = nearest(name, ("policy", "inner")) or nearest(name, inductor_options())
            raise SSPropError(
                f"options[{name!r}] is not known; expected policy, inner, or an option of Inductor"
                + (f"; nearest: {near}" if near else "")
            )


@functools.cache
def default_policy() -> Policy:
    """The policy of ``torch.compile(model, backend="ssprop")`` without options; one per process, on its own clock."""
    return Policy()


def policy_for(policy: Any, roots: Iterable[nn.Module]) -> Policy | None:
    """The policy of the options; a file or mapping is read once for a model, so that all its graphs share one clock.

    What happens to the file meanwhile is the next model's, or that of this one once :func:`forget_files` was called.

    Args:
        roots: the models that a graph is of.

    Raises:
        PolicyError, TypeError: as :func:`ssprop_fx.transform.as_policy`.
        SSPropError: the file or mapping has a schedule that nobody could advance.
    """
    if policy is None or isinstance(policy, Policy):
        return policy
    root = next(iter(roots), None)
    path = os.path.abspath(policy) if isinstance(policy, (str, os.PathLike)) else None
    with _lock:
        read = _read if root is None else _read_for.setdefault(root, {})
        known, resets = read.get(path or "", (None, 0))
    if known is not None and resets == _resets:
        return known
    made = as_policy(policy)
    if made.schedule.clock == "manual" and made.schedule.moves:
        raise SSPropError(
            "the policy in torch.compile's options has a schedule with a manual clock, and as a path or mapping nobody "
            "holds it to call policy.step(); pass a Policy object (ssprop_fx.Policy.load(...)) and step that, or set "
            "`clock: optimizer` in the schedule"
        )
    with _lock:
        key = path or made.digest
        known, _ = read.get(key, (made, 0))
        read[key] = known if known.digest == made.digest else made, _resets
        return read[key][0]


def forget_files() -> None:
    """Read the files anew where they are asked for; a model whose file still says the same keeps its clock."""
    global _resets
    _resets += 1
