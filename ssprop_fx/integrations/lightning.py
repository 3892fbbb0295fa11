"""For Lightning: advances the policies of a LightningModule's networks, and keeps their clocks in the checkpoints."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..policy import Policy
from . import advance, load_states, policies_of


class PolicyCallback(Callback):
    """Advance every policy with a manual clock after each optimizer step.

    Transform the networks in the module's ``__init__``: ``self.net = ssprop_fx.transform(net, policy)``. Their parameters'
    names stay, so that checkpoints load with or without this. With accumulated gradients a step is an optimizer step; a
    batch in which several optimizers step counts once.

    Raises:
        SSPropError: when training starts, if the module holds no transformed network.
    """

    def __init__(self) -> None:
        self._policies: list[Policy] = []
        self._states: list[Any] = []  # of a checkpoint, until the policies are known
        self._seen = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the policies; Lightning calls this."""
        self._policies = policies_of(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to the checkpoint's clocks, where there is one; Lightning calls this."""
        if self._states:
            load_states(self._policies, self._states)
            self._states = []
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Advance if an optimizer has stepped; Lightning calls this."""
        if trainer.global_step > self._seen:
            advance(self._policies)
        self._seen = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """The clocks, for a checkpoint."""
        return {"policies": [policy.state_dict() for policy in self._policies]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the clocks of a checkpoint; they are set when training starts."""
        self._states = state_dict["policies"]
