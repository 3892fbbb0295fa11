"""The convolutions of a model as it stands, by layer name, and what a policy says of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .calls import functional_name
from .convolutions import CONVOLUTIONS, LINEAR, conv_kinds, spec_of_module, weight_shape
from .errors import PolicyError, TransformError
from .naming import plain_modules, plain_name
from .policy import KINDS, Policy, Settings
from .reach import Known, classes_of, may_call_convolution

_CALLS = 100  # of one function in one forward; rules for any of them are taken to match


def require_module(model: Any, by: str) -> None:
    """Refuse what is no module.

    Raises:
        TransformError: with the function, ``by``, that was given it.
    """
    if not isinstance(model, nn.Module):
        raise TransformError(
            f"{by} takes a torch.nn.Module, got {type(model).__name__}"
            + (f"; call {by} on the instance, not on the class" if isinstance(model, type) else "")
        )


def layer_kinds(model: nn.Module, plain: bool = False) -> dict[str, frozenset[str]]:
    """Layer name → kinds, for every convolution and linear module of ``model`` (functional calls show when they run).

    Args:
        plain: whether names are as in a graph, without the segments that wrappers add.
    """
    found: dict[str, frozenset[str]] = {}
    for name, module in _modules(model, plain):
        spec = spec_of_module(module)
        if spec is None and isinstance(module, nn.Linear) and LINEAR.is_plain(type(module)):
            found[name] = frozenset({LINEAR.name})
        elif spec is not None and not isinstance(module, torch.jit.ScriptModule):
            m: Any = module
            if isinstance(m._parameters.get("weight"), nn.parameter.UninitializedParameter):
                raise TransformError(
                    f"{name or type(module).__name__} is a lazy module that has no weight yet; "
                    "run one forward pass (or model.initialize_parameters) and call transform after it"
                )
            found[name] = conv_kinds(spec, weight_shape(m, spec), m.groups)
    return found


def functional_callers(model: nn.Module, plain: bool = False) -> set[str]:
    """Names of the modules whose forward may call a convolution function, convolution modules among them.

    Args:
        plain: as for :func:`layer_kinds`.
    """
    tree, classes, known = frozenset(map(id, model.modules())), classes_of(model), Known()
    modules = ((n, m) for n, m in _modules(model, plain) if not isinstance(m, torch.jit.ScriptModule))
    return {name for name, module in modules if may_call_convolution(module, tree, classes, known)}


def convolves(layers: Mapping[str, frozenset[str]], callers: Collection[str]) -> bool:
    """Whether a model has a convolution, by what :func:`layer_kinds` and :func:`functional_callers` say of it."""
    return bool(set().union(*layers.values()) - {LINEAR.name}) or bool(callers)


def assign_checked(
    model: nn.Module, policy: Policy, layers: dict[str, frozenset[str]], callers: set[str], plain: bool = False
) -> dict[str, Settings]:
    """Layer name → settings for the convolution modules of a model, every rule accounted for.

    Args:
        layers, callers: what :func:`layer_kinds` and :func:`functional_callers` say of the model.
        plain: as for both.

    Raises:
        TransformError: the model has no convolution.
        PolicyError: a rule can match neither a layer nor a functional call that a module of the model may make.
    """
    if not convolves(layers, callers) and not policy.wants_linear:
        raise TransformError(
            f"{type(model).__name__} has no convolution, so there is nothing to transform; it holds {_census(model)}"
        )
    everything = dict(layers)
    for owner in callers:
        for function in CONVOLUTIONS:
            for nth in range(_CALLS):
                everything[functional_name(owner, function, nth)] = frozenset(KINDS) - {"linear"}
    if problems := policy.unmatched_rules(everything):
        at_fault = {problem.key.partition(".")[0] for problem in problems}
        found = policy.unmatched_rules(layers, _aliases(model, layers, plain))
        raise PolicyError([p for p in found if p.key.partition(".")[0] in at_fault])
    assigned = policy.assign(layers, require_match=False)
    return {k: s for k, s in assigned.items() if LINEAR.name not in layers[k] or s.drop_rate > 0}


def scripted_convolutions(model: nn.Module, plain: bool = False) -> Iterator[str]:
    """Names of the convolutions inside modules scripted or traced by ``torch.jit``."""
    for name, module in _modules(model, plain):
        if isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", "").startswith("Conv"):
            yield name


def _modules(model: nn.Module, plain: bool) -> Iterator[tuple[str, nn.Module]]:
    return plain_modules(model) if plain else iter(model.named_modules())


def _aliases(model: nn.Module, layers: Collection[str], plain: bool) -> dict[str, str]:
    """Further name → layer name, for the layers whose module stands in the model more than once."""
    first = {id(module): name for name, module in _modules(model, plain) if name in layers}
    every = ((plain_name(n) if plain else n, m) for n, m in model.named_modules(remove_duplicate=False))
    return {name: first[id(module)] for name, module in every if name != first.get(id(module), name)}


def _census(model: nn.Module) -> str:
    names: dict[str, int] = {}
    for module in model.modules():
        if not list(module.children()):
            names[type(module).__name__] = names.get(type(module).__name__, 0) + 1
    return ", ".join(f"{count} × {name}" for name, count in sorted(names.items())) or "no modules"


__all__ = ["assign_checked", "convolves", "functional_callers", "layer_kinds", "require_module", "scripted_convolutions"]
