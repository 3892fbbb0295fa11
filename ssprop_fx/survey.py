"""The convolutions of a model as it stands, by layer name, and what a policy says of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .calls import functional_name
from .convolutions import CONVOLUTIONS, LINEAR, conv_kinds, spec_of_module
from .errors import PolicyError, TransformError
from .policy import KINDS, Policy, Settings
from .reach import may_call_convolution

_CALLS = 100  # of one function in one forward; rules for any of them are taken to match


def layer_kinds(model: nn.Module) -> dict[str, frozenset[str]]:
    """Layer name → kinds, for every convolution and linear module of ``model`` (functional calls show when they run)."""
    found: dict[str, frozenset[str]] = {}
    for name, module in model.named_modules():
        spec = spec_of_module(module)
        if spec is None and isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            found[name] = frozenset({LINEAR.name})
        elif spec is not None and not isinstance(module, torch.jit.ScriptModule):
            m: Any = module
            if isinstance(m._parameters.get("weight"), nn.parameter.UninitializedParameter):
                raise TransformError(
                    f"{name or type(module).__name__} is a lazy module that has no weight yet; "
                    "run one forward pass (or model.initialize_parameters) and call transform after it"
                )
            outs, ins = m.out_channels // m.groups, m.in_channels // m.groups
            shape = (m.in_channels, outs) if spec.transposed else (m.out_channels, ins)
            found[name] = conv_kinds(spec, (*shape, *m.kernel_size), m.groups)
    return found


def functional_callers(model: nn.Module) -> set[str]:
    """Names of the modules whose forward may call a convolution function."""
    tree = frozenset(map(id, model.modules()))
    return {name for name, module in _containers(model) if may_call_convolution(module, tree)}


def assign_checked(model: nn.Module, policy: Policy) -> dict[str, Settings]:
    """Layer name → settings for the convolution modules of a model, every rule accounted for.

    Raises:
        TransformError: the model has no convolution.
        PolicyError: a rule can match neither a layer nor a functional call that a module of the model may make.
    """
    layers, callers = layer_kinds(model), functional_callers(model)
    if not (set().union(*layers.values()) - {LINEAR.name}) and not callers and not policy.wants_linear:
        raise TransformError(
            f"{type(model).__name__} has no convolution, so there is nothing to transform; it holds {_census(model)}"
        )
    everything = dict(layers)
    own_calls = {n for n, m in model.named_modules() if n in layers and spec_of_module(m) and may_call_convolution(m)}
    for owner in callers | own_calls:
        for function in CONVOLUTIONS:
            for nth in range(_CALLS):
                everything[functional_name(owner, function, nth)] = frozenset(KINDS) - {"linear"}
    if problems := policy.unmatched_rules(everything):
        at_fault = {problem.key.partition(".")[0] for problem in problems}
        raise PolicyError([p for p in policy.unmatched_rules(layers) if p.key.partition(".")[0] in at_fault])
    assigned = policy.assign(layers, require_match=False)
    return {k: s for k, s in assigned.items() if LINEAR.name not in layers[k] or s.drop_rate > 0}


def scripted_convolutions(model: nn.Module) -> Iterator[str]:
    """Names of the convolutions inside modules scripted or traced by ``torch.jit``."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", "").startswith("Conv"):
            yield name


def _containers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if spec_of_module(module) is None and not isinstance(module, torch.jit.ScriptModule):
            yield name, module


def _census(model: nn.Module) -> str:
    names: dict[str, int] = {}
    for module in model.modules():
        if not list(module.children()):
            names[type(module).__name__] = names.get(type(module).__name__, 0) + 1
    return ", ".join(f"{count} × {name}" for name, count in sorted(names.items())) or "no modules"


__all__ = ["assign_checked", "functional_callers", "layer_kinds", "scripted_convolutions"]
