"""The ways to train that :mod:`ssprop_fx.bench` times against each other, what our users might do instead included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .convolutions import spec_of_module
from .coverage import BackwardCounter
from .errors import SSPropError, nearest
from .policy import Policy
from .selection import importance, keep_count, kept_channels
from .transform import transform


@dataclass(frozen=True)
class Arm:
    """A way to train: how the model is prepared, and whether a compiler runs.

    Attributes:
        build: (copy of the model, policy) → what is called in place of the model.
        compiled: through ``torch.compile``; compared with ``dense``, else with ``eager``.
        sparse: whether the arm follows the policy, so that a ceiling makes sense.
        steps: of a round, whose mean counts.
    """

    build: Callable[[nn.Module, Policy], Any]
    compiled: bool
    sparse: bool
    text: str
    steps: int = 1


ARMS: dict[str, Arm] = {
    "eager": Arm(lambda model, _: model, False, False, "the model as it is"),
    "transform": Arm(transform, False, True, "ssprop_fx.transform"),
    "dense": Arm(lambda model, _: torch.compile(model), True, False, "torch.compile"),
    "ssprop": Arm(
        lambda model, policy: _compiled(model, policy),
        True, True, 'torch.compile(backend="ssprop")',
    ),
    "dense-phase": Arm(
        lambda model, policy: _compiled(model, at_factor(policy, 0.0)),
        True, False, "the same in a dense phase",
    ),
    "schedule": Arm(
        lambda model, policy: Turns(model, policy),
        True, False, "the same, dense and sparse steps by turns as in the default policy", 2,
    ),
    "both": Arm(
        lambda model, policy: torch.compile(transform(model, policy), backend="ssprop"),
        True, True, "transform, then torch.compile",
    ),
    "masked": Arm(
        lambda model, policy: torch.compile(masked(model, policy)),
        True, False, "torch.compile, dropped channels multiplied by zero",
    ),
    "frozen": Arm(
        lambda model, policy: torch.compile(model),
        True, False, "torch.compile, first layers frozen down to the policy's backward FLOPs",
    ),
}  # fmt: skip


def _compiled(model: nn.Module, policy: Policy) -> Any:
    options: dict[str, Any] = {"policy": policy}
    return torch.compile(model, backend="ssprop", options=options)


class Turns(nn.Module):
    """A model under the backend, whose first step is sparse, the next one dense, and so on."""

    def __init__(self, model: nn.Module, policy: Policy) -> None:
        super().__init__()
        self.policy = policy.rescheduled(kind="bar", period=2)
        self.model = _compiled(model, self.policy)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.policy.step()
        return self.model(*args, **kwargs)


def at_factor(policy: Policy, factor: float) -> Policy:
    """The policy with a schedule that stands still, for measuring one of its phases."""
    return policy.rescheduled(kind="constant", start=factor, end=factor)


def check_arms(names: Sequence[str]) -> None:
    """Raise an error with the nearest arm for a name that is none.

    Raises:
        SSPropError: that error.
    """
    for name in names:
        if name not in ARMS:
            near = nearest(name, ARMS)
            hint = f"; nearest: {near}" if near else ""
            raise SSPropError(f"{name!r} is no arm; expected some of {', '.join(ARMS)}{hint}")


def base_of(arm: str) -> str:
    """The dense arm that an arm is compared with."""
    return "dense" if ARMS[arm].compiled else "eager"


class _MaskGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output, keep):
        ctx.keep = keep
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        index = kept_channels(importance(grad, None, "l1", sliced=False), 1, ctx.keep)
        mask = torch.zeros(grad.shape[1], dtype=grad.dtype, device=grad.device).index_fill(0, index, 1.0)
        return grad * mask.view(-1, *[1] * (grad.dim() - 2)), None


def masked(model: nn.Module, policy: Policy) -> nn.Module:
    """The naive way: the gradient of every convolution module's output is multiplied by a mask, the dense backward runs."""
    for module in model.modules():
        if spec_of_module(module):
            convolution: Any = module
            keep = keep_count(policy.drop_rate, convolution.out_channels)
            # another class, not a hook: the compiler reuses code of the model without, whatever hooks there are
            convolution.__class__ = _masked_class(type(module), keep)
    return model


def _masked_class(kind: type[nn.Module], keep: int) -> type[nn.Module]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return _MaskGradient.apply(kind.forward(self, *args, **kwargs), keep)

    return type(f"Masked{kind.__name__}", (kind,), {"forward": forward})


def freeze(model: nn.Module, loss: Callable[[], Tensor], policy: Policy) -> float:
    """Freeze the first parameters until the backward convolution FLOPs of a step are at most the policy's share.

    Returns:
        The share that is left, of the step before.
    """

    def flops() -> int:
        with BackwardCounter() as counter:
            result = loss()
            if result.requires_grad:
                result.backward()
        model.zero_grad(set_to_none=True)
        return counter.conv_flops

    dense, parameters = flops(), list(model.parameters())
    low, high = 0, len(parameters) - 1  # the fewest that are enough; the last one stays, or there is no backward pass
    while low < high:
        middle = (low + high) // 2
        for i, parameter in enumerate(parameters):
            parameter.requires_grad_(i >= middle)
        if flops() <= (1 - policy.drop_rate) * dense:
            high = middle
        else:
            low = middle + 1
    for i, parameter in enumerate(parameters):
        parameter.requires_grad_(i >= low)
    return flops() / dense
