"""Convolutions + policy → one decision for each, with the rule that made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssprop_fx.policy import Policy, Settings

from .find_convolutions import Convolution


@dataclass(frozen=True)
class Decision:
    """What the policy says of one convolution. ``sparse`` is False where its drop rate is zero."""

    convolution: Convolution
    settings: Settings

    @property
    def sparse(self) -> bool:
        return self.settings.drop_rate > 0


def assign_policy(convolutions: Sequence[Convolution], policy: Policy, require_match: bool = False) -> list[Decision]:
    """Apply the policy's rules to each convolution, by layer name and kind.

    Args:
        require_match: refuse rules that match none of these; leave it off where a graph is only a part of the model.

    Raises:
        PolicyError: a rule matches nothing, and ``require_match``.
    """
    kinds: dict[str, frozenset[str]] = {}
    for c in convolutions:
        kinds[c.layer] = kinds.get(c.layer, frozenset()) | c.kinds
    settings = policy.assign(kinds, require_match=require_match)
    policy.bind(settings)
    return [Decision(c, settings[c.layer]) for c in convolutions]
