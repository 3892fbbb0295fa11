"""What the options of ``torch.compile(model, backend="ssprop", options=…)`` stand for."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ._compat import inductor_options
from .errors import SSPropError, nearest
from .policy import Policy
from .transform import as_policy

_lock = threading.Lock()
_resets = 0  # of Dynamo
# By the path as given, whatever the current folder became, and as an absolute one, or by digest of a mapping; after how many
# resets it was read, and the mapping that was, by its identity, too.
_Read = dict[Any, tuple[Policy, int, Any]]
_read: _Read = {}  # for graphs without a module
_read_for: weakref.WeakKeyDictionary[nn.Module, _Read] = weakref.WeakKeyDictionary()


def with_known_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options for Inductor, which gets all but ours, by the names that it has for them: ``max-autotune`` is one, too.

    Raises:
        SSPropError: for any that it does not have, with the nearest name.
    """
    found = {}
    for given, value in settings.items():
        name = given.replace("-", "_")
        if name not in inductor_options():
            near = nearest(given, ("policy", "inner")) or nearest(given, inductor_options())
            raise SSPropError(
                f"options[{given!r}] is not known; expected policy, inner, or an option of Inductor"
                + (f"; nearest: {near}" if near else "")
            )
        found[name] = value
    return found


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
    is_path = isinstance(policy, (str, os.PathLike))
    given = os.fspath(policy) if is_path else id(policy)
    with _lock:
        read = _read if root is None else _read_for.setdefault(root, {})
        for key in (given, os.path.abspath(policy)) if is_path else (given,):
            known, resets, source = read.get(key, (None, -1, None))
            if known is not None and resets == _resets and (is_path or source is policy):
                return known
    made = as_policy(policy)
    if made.schedule.clock == "manual" and made.schedule.moves:
        raise SSPropError(
            "the policy in torch.compile's options has a schedule with a manual clock, and as a path or mapping nobody "
            "holds it to call policy.step(); pass a Policy object (ssprop_fx.Policy.load(...)) and step that, or set "
            "`clock: optimizer` in the schedule"
        )
    with _lock:
        key = os.path.abspath(policy) if is_path else made.digest
        known, *_ = read.get(key, (made, 0, None))
        read[key] = read[given] = known if known.digest == made.digest else made, _resets, policy
        return read[key][0]


def forget_files() -> None:
    """Read the files anew where they are asked for; a model whose file still says the same keeps its clock."""
    global _resets
    _resets += 1
