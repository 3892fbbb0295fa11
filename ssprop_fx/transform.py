"""Front end one: ``transform(model, policy)``, for eager mode and as the first step before ``torch.compile``."""

from __future__ import annotations

import functools
import logging
import os
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ._compat import is_compiled
from .allocation import Allocation, Follower
from .calls import CallSites, Intercepted, run_intercepted
from .convolutions import LINEAR, ConvSpec, spec_of_module, weight_shape
from .errors import TransformError
from .policy import Policy, Settings
from .reach import classes_of, hooks_that_may_call
from .sharing import shared_copy
from .sites import Site, convolve_linear_module, convolve_module, convolve_transposed_module
from .survey import assign_checked, functional_callers, layer_kinds, require_module, scripted_convolutions

logger = logging.getLogger(__name__)

# why a layer is left as it is
COMPLEX = "complex numbers: only real convolutions are rewritten"
SCRIPTED = "inside a module scripted by torch.jit, which hides it; transform the model as it was before scripting"

_RECORD = "_ssprop"  # attribute of a transformed model's root


class Transformation(Follower):
    """What ``transform`` did to one model: its sites by layer name, and its live allocation.

    Attributes:
        sites: layer name → site, in the model's order; functional calls are added as they are first seen.
        skipped: layer name → reason, for the convolutions that were left as they are.
    """

    def __init__(self, policy: Policy) -> None:
        self.allocation = Allocation(policy)
        self.sites: dict[str, Site] = {}
        self.skipped: dict[str, str] = {}
        self.listening = False

    @property
    def policy(self) -> Policy:
        """The policy in force; a copied model shares it with the original."""
        return self.allocation.policy

    def add(self, layer: str, spec: ConvSpec, kinds: frozenset[str], settings: Settings, rung: str) -> Site:
        site = self.sites[layer] = Site(layer, spec, kinds, settings, self.allocation, rung)
        if self.listening:
            site.calls = []
        return site

    def listen(self, allocation: Allocation) -> None:
        """Let the sites, those still to be met included, note their calls, and follow another allocation."""
        self.allocation, self.listening = allocation, True
        for site in self.sites.values():
            site.allocation, site.calls, site.known = allocation, [], False

    def add_functional(self, layer: str, spec: ConvSpec, kinds: frozenset[str]) -> Site:
        """The site of a functional call that is new, in name or kind: one for each decision of the policy about that name."""
        settings = self.policy.assign({layer: kinds}, require_match=False)
        alike = [s for name, s in self.sites.items() if name.partition(":")[0] == layer and s.settings == settings[layer]]
        if alike:
            return alike[0]
        name = layer if layer not in self.sites else f"{layer}:{'+'.join(sorted(kinds - {spec.name, 'functional'})) or 'full'}"
        self.policy.bind({name: settings[layer]})
        return self.add(name, spec, kinds, settings[layer], "call")


def transform(model: nn.Module, policy: Policy | str | dict | None = None) -> nn.Module:
    """A model that trains with sparse convolution backward passes, otherwise the same.

    The result is of the same class, has the same ``state_dict`` keys, attributes, methods and hooks, and shares
    parameters and buffers with ``model``, which itself is left as it is and still runs dense. Forward results are equal
    bit for bit. Optimizers made for either serve both. Wrap (DDP) or compile the result, not the other way round.

    Move or convert a model (``.to``, ``.double``) before: moving the result puts new buffers into it alone. What hooks and
    attributes hold is copied, too: register hooks, and change attributes, on the result.

    Args:
        model: any module; nothing needs to be run first, except to materialise lazy modules.
        policy: a :class:`Policy`, the path of a policy file, a mapping as in such a file, or None for the default
            policy (drop rate 0.8 on every other step). Keep the policy at hand: ``policy.step()`` advances its clock.

    Raises:
        TransformError: the model cannot be transformed, or holds no convolution.
        PolicyError: the policy is invalid, or one of its rules matches no layer.

    Source: ssProp, arXiv 2408.12561.

    Examples:
        >>> policy = ssprop_fx.Policy(drop_rate=0.75, schedule={"kind": "constant"})
        >>> model = transform(torch.nn.Conv2d(3, 8, 3), policy)
        >>> model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        >>> rows = model.weight.grad.flatten(1).abs().sum(1)  # 6 of 8 output channels were dropped
        >>> int((rows > 0).sum())
        2
    """
    given, policy = policy, as_policy(policy)
    result = transformed(model, policy)
    policy.warn_if_idle(held=given is policy)
    return result


def transformed(model: nn.Module, policy: Policy) -> nn.Module:
    """:func:`transform` for a trial that nobody trains: whether the policy is ever stepped is nobody's concern."""
    _refuse(model)
    layers, callers = layer_kinds(model), functional_callers(model)
    assigned = assign_checked(model, policy, layers, callers)

    result = shared_copy(model, shared=[policy])  # which the model may hold, to step it
    record, classes = Transformation(policy), classes_of(result)
    for name, module in result.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        spec = spec_of_module(module, linear=True)
        if spec is not None and name in assigned:
            weight = module._parameters.get("weight")
            if weight is not None and weight.is_complex():
                record.skipped[name] = COMPLEX
                continue
            site = record.add(name, spec, layers[name], assigned[name], "module")
            _rewrite_module(
                module, site, CallSites(name, record.add_functional, site, weight_shape(module, spec)), name in callers
            )
        elif name in callers:
            _intercept(module, CallSites(name, record.add_functional))
        if name in callers:
            _intercept_hooks(module, CallSites(name, record.add_functional), classes)
    for name in scripted_convolutions(model):
        record.skipped[name] = SCRIPTED
    policy.bind({name: site.settings for name, site in record.sites.items()})
    vars(result)[_RECORD] = record
    vars(result)["__prepare_scriptable__"] = _refuse_to_script
    logger.info(
        "transformed %s: %d convolution modules, %d modules watched for functional calls",
        type(model).__name__,
        len(record.sites),
        len(callers - record.sites.keys()),
    )
    return result


def transformation_of(model: nn.Module) -> Transformation | None:
    """The record that ``transform`` left on a model, looked for through wrappers, or None."""
    return next((vars(part)[_RECORD] for part in transformed_parts(model).values()), None)


def transformed_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The results of ``transform`` by name: modules inside a model, or the model itself."""
    return {name: module for name, module in model.named_modules() if _RECORD in vars(module)}


def rewritten_modules(model: nn.Module) -> Iterator[str]:
    """Names of the modules whose convolution calls were replaced, wherever the root of the transformed model is."""
    ours = {convolve_module, convolve_transposed_module, convolve_linear_module, run_intercepted}
    for name, module in model.named_modules():
        bound = (vars(module).get(key) for key in ("forward", "_conv_forward"))
        if any(isinstance(b, functools.partial) and b.func in ours for b in bound):
            yield name


def changed_layers(part: nn.Module, record: Transformation) -> tuple[set[str], dict[str, nn.Module]]:
    """What was done to a result of ``transform`` since.

    Returns:
        The names of the layers that are no longer there; the convolution modules, by name, that were put in, but for those
        beneath a forward that is intercepted, whose calls follow the policy as functional ones.
    """
    sites = {name: set(_sites_of(module)) for name, module in part.named_modules()}
    live = set().union(*sites.values())
    gone = {name for name, site in record.sites.items() if site.rung == "module" and site not in live}
    ours = record.skipped.keys() | {name for name, found in sites.items() if found}
    new = {n: m for n, m in part.named_modules() if spec_of_module(m) is not None and n not in ours}
    watched = {n for n, m in part.named_modules() if isinstance(vars(m).get("forward"), Intercepted)}
    return gone, {n: m for n, m in new.items() if watched.isdisjoint(_ancestors(n))}


def _ancestors(name: str) -> Iterator[str]:
    """Names of the modules around one, the root's included."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _sites_of(module: nn.Module) -> Iterator[Site]:
    for key in ("forward", "_conv_forward"):
        bound = vars(module).get(key)
        for argument in bound.args if isinstance(bound, functools.partial) else ():
            site = argument.own if isinstance(argument, CallSites) else argument
            if isinstance(site, Site):
                yield site


def as_policy(policy: Policy | str | dict | None) -> Policy:
    """A policy from whatever a user may hand over.

    Raises:
        PolicyError: the file or mapping is invalid.
        TypeError: it is none of these.
    """
    if policy is None:
        return Policy()
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Mapping):
        return Policy.from_dict(dict(policy))
    if isinstance(policy, (str, os.PathLike)):
        return Policy.load(policy)
    raise TypeError(
        f"a policy is a Policy, the path of a policy file, a mapping as in such a file, or None; got {policy!r}"
        + (f"; for a drop rate, Policy(drop_rate={policy!r})" if isinstance(policy, (int, float)) else "")
    )


def _rewrite_module(module: nn.Module, site: Site, call_sites: CallSites, calls_functions: bool) -> None:
    """Install the site; a subclass keeps its own forward, and the convolution call which that makes is replaced.

    Args:
        call_sites: for a forward of its own, one of whose calls is the site's.
        calls_functions: whether its code may call a convolution function.
    """
    spec = site.spec
    cls = type(module)
    if spec is LINEAR and "forward" not in vars(module):
        _replace_forward(module, functools.partial(convolve_linear_module, module, site))
    elif (
        spec is not LINEAR
        and not spec.transposed
        and spec.is_plain(cls, conv_forward=True)
        and "_conv_forward" not in vars(module)
        and not calls_functions
    ):
        vars(module)["_conv_forward"] = functools.partial(convolve_module, module, site)
    elif spec.transposed and spec.is_plain(cls) and "forward" not in vars(module):
        _replace_forward(module, functools.partial(convolve_transposed_module, module, site))
    else:
        _intercept(module, call_sites)


def _intercept(module: nn.Module, call_sites: CallSites) -> None:
    if isinstance(module, torch.fx.GraphModule) and "forward" not in vars(module):
        vars(module)["recompile"] = functools.partial(_recompile, module)
    _replace_forward(module, Intercepted(run_intercepted, call_sites, module.forward))


def _intercept_hooks(module: nn.Module, call_sites: CallSites, classes: frozenset[type]) -> None:
    """Hooks run outside of the forward. Those that do not convolve stay as they are: torch looks for its own by their class."""
    for hooks, key in hooks_that_may_call(module, classes):
        hooks[key] = Intercepted(run_intercepted, call_sites, hooks[key])


def _replace_forward(module: nn.Module, forward: functools.partial) -> None:
    vars(module)["forward"] = forward
    vars(module)["_replicate_for_data_parallel"] = functools.partial(_replicate, module)


def _recompile(module: torch.fx.GraphModule) -> Any:
    """``recompile`` of a graph whose forward is intercepted: the new one is, from then on."""
    code, forward = type(module).recompile(module), vars(module)["forward"]
    own = types.MethodType(type(module).forward, module)
    forward.__setstate__((forward.func, (forward.args[0], own), {}, {}))  # the same object: pickle recompiles, and has met it
    return code


def _replicate(module: nn.Module) -> nn.Module:
    """A replica for ``nn.DataParallel``, whose forward is not that of the module which it is a replica of."""
    replica = type(module)._replicate_for_data_parallel(module)
    forward = vars(module)["forward"]
    arguments = [replica if a is module else a for a in forward.args]
    if isinstance(forward, Intercepted) and getattr(arguments[1], "__self__", None) is module:
        arguments[1] = types.MethodType(arguments[1].__func__, replica)
    vars(replica)["forward"] = type(forward)(forward.func, *arguments)
    return replica


def _refuse(model: Any) -> None:
    require_module(model, "transform")
    if isinstance(model, torch.jit.ScriptModule):
        raise TransformError(
            "the model was scripted or traced by torch.jit, which hides its convolutions; call transform on the Python model"
        )
    wrapper = type(model).__name__
    if is_compiled(model):
        raise TransformError("the model is already compiled; call transform first and torch.compile on its result")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TransformError(f"the model is wrapped in {wrapper}; call transform first and wrap its result")
    if transformation_of(model) is not None:
        raise TransformError(
            "the model has been transformed already; call transform on the original model, "
            "which shares its parameters, to train it under another policy"
        )
    if (part := next(rewritten_modules(model), None)) is not None:
        raise TransformError(
            f"{part or 'the model'} is part of a model that has been transformed already; "
            "take the parts of the original model, which shares its parameters, and call transform on what you build of them"
        )
    if is_sharded(model):
        raise TransformError("the model's parameters are sharded by FSDP; call transform first and shard its result")


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP, of either kind, has sharded a model or a part of it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrappers = tuple(getattr(fsdp, n) for n in ("FullyShardedDataParallel", "FSDPModule") if hasattr(fsdp, n))
    return any(isinstance(module, wrappers) for module in model.modules())


def _refuse_to_script() -> None:
    """What ``torch.jit.script`` asks a module for before it compiles it."""
    raise TransformError(
        "torch.jit.script compiles a model for its forward pass, in which a transformed model is the original; "
        "script the original model, which shares its parameters"
    )
