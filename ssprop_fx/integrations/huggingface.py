"""For the Trainer of Hugging Face: advances the policies of a model, and keeps their clocks in the checkpoints."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..policy import Policy
from . import advance, load_states, policies_of


class PolicyCallback(TrainerCallback, ExportableState):
    """Advance every policy with a manual clock after each optimizer step.

    Give the Trainer a transformed model, ``Trainer(ssprop_fx.transform(model, policy), callbacks=[PolicyCallback()], ...)``.
    The clocks are saved in ``trainer_state.json`` and loaded by ``trainer.train(resume_from_checkpoint=...)``.

    Raises:
        SSPropError: when training starts, if the model holds no transformed network.
    """

    def __init__(self) -> None:
        self._policies: list[Policy] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the policies, and go to the checkpoint's clocks when resuming; the Trainer calls this."""
        self._policies = policies_of(kwargs["model"])
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("states")
        if state.global_step > 0 and saved:
            load_states(self._policies, saved)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance; the Trainer calls this after each optimizer step."""
        advance(self._policies)

    def state(self) -> dict[str, Any]:
        """The clocks, for ``trainer_state.json``."""
        return {"args": {}, "attributes": {"states": [policy.state_dict() for policy in self._policies]}}
