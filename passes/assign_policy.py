"""Convolutions + policy → one decision for each, with the rule that made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ssprop_fx.convolutions import LINEAR
from ssprop_fx.errors import PolicyError
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

    Models that one function calls may have layers of the same name: a linear layer is not asked about as a convolution.

    Args:
        require_match: refuse rules that match none of these; leave it off where a graph is only a part of the model.

    Raises:
        PolicyError: a rule matches nothing, and ``require_match``.
    """
    kinds: dict[str, frozenset[str]] = {}
    linear: dict[str, frozenset[str]] = {}
    for c in convolutions:
        of_layer = linear if c.spec is LINEAR else kinds
        of_layer[c.layer] = of_layer.get(c.layer, frozenset()) | c.kinds
    if require_match and (problems := policy.unmatched_rules(linear | kinds)):
        raise PolicyError(problems)
    settings, of_linear = (policy.assign(layers, require_match=False) for layers in (kinds, linear))
    policy.bind(of_linear | settings)
    return [Decision(c, (of_linear if c.spec is LINEAR else settings)[c.layer]) for c in convolutions]
