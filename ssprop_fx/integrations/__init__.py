"""Callbacks for trainers that own the loop: :mod:`.lightning` and :mod:`.huggingface`, each to be imported by name.

Transform the network where it is made and give the trainer a ``PolicyCallback``: it finds the policies in the model,
advances the manual clocks after each optimizer step, and keeps all clocks in the trainer's checkpoints. Nothing else in the
package imports these modules, and each needs its library: the extras ``lightning`` and ``huggingface``. Accelerate and
loops of one's own need no integration: ``accelerator.register_for_checkpointing(policy)`` and ``policy.step()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..errors import SSPropError
from ..policy import Policy
from ..transform import transformation_of


def policies_of(model: nn.Module) -> list[Policy]:
    """The policies of the transformed networks in a model, each once, in the model's order.

    Raises:
        SSPropError: there is none.
    """
    records = (transformation_of(module) for module in model.modules())
    found = list({id(record.policy): record.policy for record in records if record is not None}.values())
    if not found:
        raise SSPropError(
            f"{type(model).__name__} holds no network that ssprop_fx.transform has made; "
            "transform the network where the model is built: self.net = ssprop_fx.transform(net, policy)"
        )
    return found


def advance(policies: Sequence[Policy]) -> None:
    """One step of each policy that does not hear of optimizer steps itself."""
    for policy in policies:
        if policy._clock.mode == "manual":
            policy.step()


def load_states(policies: Sequence[Policy], states: Sequence[Any]) -> None:
    """Set the clocks to the states of a checkpoint.

    Raises:
        SSPropError: the checkpoint is of another number of policies.
        PolicyError: a state is not of its policy's schedule.
    """
    if len(states) != len(policies):
        raise SSPropError(f"the checkpoint holds {len(states)} policies, the model {len(policies)}")
    for policy, state in zip(policies, states, strict=True):
        policy.load_state_dict(state)
