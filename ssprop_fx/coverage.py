"""Coverage measured: the convolution backward passes that one training step really makes, and how many of them are ours."""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ._compat import in_backward, is_compiled, is_optimized_module, run_alone
from .allocation import Allocation, observers
from .convolutions import ConvSpec, conv_backward_flops
from .cost import Call
from .errors import SSPropError, TransformError
from .functions import handled
from .naming import plain_name, unwrap
from .policy import Policy, Settings
from .sharing import shared_copy
from .steps import attributes_put_back, call_model, training_step, undone
from .transform import Transformation, is_sharded, transform, transformation_of, transformed_parts

_FORWARD = torch.ops.aten.convolution.default
_BACKWARD = torch.ops.aten.convolution_backward.default
_OF_COMPLEX = 3  # real convolutions, which PyTorch makes of one of complex numbers


@dataclass(frozen=True)
class MeasuredLayer:
    """A layer as a training step met it: its row of the convolution table, kinds, settings, and its calls in order.

    Attributes:
        calls: those with a backward pass, or which would have one if anything required it.
        called: whether there was any call.
        complex: whether its weight is of complex numbers, and it stays dense.
    """

    spec: ConvSpec
    kinds: frozenset[str]
    settings: Settings
    calls: tuple[Call, ...]
    called: bool = True
    complex: bool = False


@dataclass(frozen=True)
class Measurement:
    """Convolution backward calls of one dense and one sparse step.

    Attributes:
        dense: ``aten.convolution_backward`` calls of the step with a factor of zero.
        sparse: sparse backward passes of the step with a factor of one.
        unprofitable: those that follow the policy and yet stay dense then, as ``profitable: auto`` found that it pays.
        dense_by_rule: calls that are dense in the second step because their drop rate is zero.
        calls: layer → sparse backward passes in the step.
        conv_flops: of the dense step's convolution backwards, a multiply-add counted as two.
        step_flops: of the whole dense step, forward and backward, of the operations that have a formula in
            ``torch.utils.flop_counter`` (which counts the weight gradient of a grouped convolution as if it were not
            grouped; here it is counted as what it is).
        backward_flops: of the dense step's backward pass, counted in the same way.
        layers: what a transformed model's dense step made of each layer, calls in order.
        missed: layer → how many of its convolution backwards no captured graph holds, the function's name, kinds.
        hidden: module → how many convolutions with a gradient its forward makes that can be neither rewritten nor named,
            in code scripted by ``torch.jit`` for instance.
        elsewhere: convolutions with a gradient that are made while none of the model's forwards runs.
    """

    dense: int
    sparse: int
    dense_by_rule: int
    calls: dict[str, int] = field(default_factory=dict)
    conv_flops: int = 0
    step_flops: int = 0
    backward_flops: int = 0
    layers: dict[str, MeasuredLayer] = field(default_factory=dict, repr=False)
    missed: dict[str, tuple[int, str, frozenset[str]]] = field(default_factory=dict)
    hidden: dict[str, int] = field(default_factory=dict)
    elsewhere: int = 0
    unprofitable: int = 0

    @property
    def coverage(self) -> float:
        """Share of the dense step's convolution backwards that the policy reaches."""
        return (self.sparse + self.dense_by_rule + self.unprofitable) / self.dense if self.dense else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "dense": self.dense, "sparse": self.sparse, "dense_by_rule": self.dense_by_rule, "unprofitable": self.unprofitable,
            "coverage": self.coverage, "calls": self.calls, "conv_flops": self.conv_flops,
            "backward_flops": self.backward_flops, "step_flops": self.step_flops,
            "missed": {layer: calls for layer, (calls, *_) in self.missed.items()}, "hidden": self.hidden,
        }  # fmt: skip

    def __str__(self) -> str:
        lost = f"{self.unprofitable} dense since dropping does not pay, " if self.unprofitable else ""
        missed = self.dense - self.sparse - self.dense_by_rule - self.unprofitable
        return (
            f"measured: {self.sparse} of {self.dense} convolution backwards of a step are sparse, "
            f"{self.dense_by_rule} dense by rule, {lost}{missed} missed"
        )


class BackwardCounter(TorchDispatchMode):
    """Counts ``aten.convolution_backward`` calls, their FLOPs and those of everything while it is active."""

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # imports Triton, which nothing else here needs

        super().__init__()
        self.formulas = flop_registry
        self.count = self.conv_flops = self.flops = self.backward_flops = 0
        self.hidden: Counter[str] = Counter()
        self.running: list[str] = []

    def watch(self, model: nn.Module) -> None:
        """Count in ``hidden``, by module, the convolutions that no site of a transformed model makes, in a dense step."""
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                module.register_forward_pre_hook(functools.partial(self._enter, name))
                module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self.running.append(name)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is _FORWARD and self.running and not handled() and not in_backward() and torch.is_grad_enabled():
            self.hidden[self.running[-1]] += any(t.requires_grad for t in args[:2])
        if func is _BACKWARD:
            grad, input, weight, _, _, _, _, transposed, _, _, mask = args
            flops = conv_backward_flops(input.shape if transposed else grad.shape, weight.shape, sum(mask[:2]))
            self.count, self.conv_flops = self.count + 1, self.conv_flops + flops
        elif func._overloadpacket in self.formulas:
            flops = self.formulas[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        else:
            return result
        self.flops += flops
        self.backward_flops += flops * in_backward()
        return result


def measure(model: nn.Module, example_inputs: Any) -> Measurement:
    """Run one dense and one sparse training step and count.

    The loss is the mean square of every floating-point output. Parameters, buffers, tensors among the attributes and in what
    they refer to, gradients, random states and clocks are put back; hooks that wait for a parameter's gradient do not run.

    Args:
        model: transformed, compiled, or both.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        SSPropError: no output of the model carries a gradient, the model is sharded, or a part of it is lazy and has not run.
    """
    if is_sharded(model):
        raise SSPropError(
            "a model that FSDP has sharded cannot be measured, since a copy of it would share what FSDP frees; inspect it "
            "without example inputs after a step, or with them before it is sharded"
        )
    if lazy := [name for name, module in unwrap(model).named_modules() if _waits(module)]:
        raise SSPropError(
            f"lazy layers of {type(unwrap(model)).__name__} have not run yet: {', '.join(lazy)}; a measured step would make "
            "their parameters for good. Run one forward pass of the model and inspect it after that, or without example inputs"
        )
    try:
        with torch.inference_mode(False):  # whoever asks: what is measured is training
            return _measure(model, tree_map(_normal, example_inputs))
    finally:
        if is_compiled(model):
            # The copies refer to themselves. Whoever keeps models weakly (spikingjelly's caches) would see them die at any
            # time, in the midst of compiling the next step, too.
            gc.collect()


def _waits(module: nn.Module) -> bool:
    """Whether a lazy module waits for its first input to know its shapes."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def _normal(value: Any) -> Any:
    """A tensor made in inference mode, which autograd refuses, as one that is not."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _measure(model: nn.Module, example_inputs: Any) -> Measurement:
    user_model = unwrap(model)
    record = transformation_of(user_model)
    # layers are named from the transformed part on, whatever it is in
    place, part = next(iter(transformed_parts(user_model).items()), ("", user_model))
    counter = BackwardCounter()
    with undone(user_model):
        dense_model = _forced(user_model, 0.0)
        if record is not None:
            counter.watch(dense_model)
        with torch.compiler.set_stance("force_eager"), counter:
            training_step(dense_model, example_inputs)
    seen: Counter[str] = Counter()
    with undone(user_model), attributes_put_back(model), _observing(seen.update):
        if is_compiled(model):  # compiled code is that of the user's own modules
            run_alone(model)
            training_step(model, example_inputs)
        else:
            training_step(_forced(user_model, 1.0), example_inputs)
    everything = Counter(seen)
    for name, module in part.named_modules():
        if isinstance(module, nn.Linear):
            del seen[name]  # rewritten, but no convolution
    flops = counter.conv_flops, counter.flops, counter.backward_flops
    if record is not None:
        met = transformation_of(dense_model)
        assert met is not None
        layers = _measured(record, met, everything, is_compiled(model))
        seen = _once_for_all_samples(seen, {name: len(layer.calls) for name, layer in layers.items()})
        by_rule = sum(n for layer, n in seen.items() if layers[layer].settings.drop_rate == 0)
        complex_calls = sum(any(c.needs or ()) for site in met.sites.values() if site.complex for c in site.calls or ())
        elsewhere = max(0, counter.count - seen.total() - counter.hidden.total() - _OF_COMPLEX * complex_calls)
        hidden = Counter({_within(place, name): count for name, count in counter.hidden.items()})
        for layer in record.skipped:  # those have rows of their own
            caller = _caller(part, layer)
            hidden[caller] = 0 if caller == layer else hidden[caller] - 1
        reached = seen.total() - by_rule, by_rule, dict(seen)
        return Measurement(counter.count, *reached, *flops, layers, hidden=dict(+hidden), elsewhere=elsewhere)
    made, kinds = _made(user_model, example_inputs)
    dense_layers = _under_shared_names(user_model, seen, made)
    seen = _once_for_all_samples(seen, made)
    by_rule = sum(made[layer] for layer in dense_layers)
    missed = {n: (count - seen[n], *kinds[n]) for n, count in made.items() if count > seen[n] and n not in dense_layers}
    return Measurement(counter.count, seen.total(), by_rule, dict(seen), *flops, missed=missed)


def _once_for_all_samples(seen: Counter[str], made: Mapping[str, int]) -> Counter[str]:
    """Compiled code runs a call under ``vmap`` for one sample after another; it counts once, as in the dense step."""
    return Counter({layer: min(count, made.get(layer) or count) for layer, count in seen.items()})


def _within(place: str, name: str) -> str:
    """The name of a module of the part at ``place``, as seen from there; that of any other module as it is."""
    return "" if name == place else name.removeprefix(f"{place}.") if place else name


def _caller(model: nn.Module, layer: str) -> str:
    """The innermost module around ``layer`` that is not scripted."""
    while layer and isinstance(model.get_submodule(layer), torch.jit.ScriptModule):
        layer = layer.rpartition(".")[0]
    return layer


def _made(user_model: nn.Module, example_inputs: Any) -> tuple[Counter[str], dict[str, tuple[str, frozenset[str]]]]:
    """The convolution backwards of a step by layer, function and kinds of each layer, as ``transform`` would find them."""
    made: Counter[str] = Counter()
    try:
        model = _uncompiled(shared_copy(user_model, share_listeners=False), set(user_model.modules()))
        model = transform(model, Policy(drop_rate=0.5, schedule={"kind": "constant"}))
        run_alone(model)
    except TransformError:  # scripted, for one
        return made, {}
    with undone(user_model), _observing(made.update), torch.compiler.set_stance("force_eager"):
        training_step(model, example_inputs)
    record = transformation_of(model)
    assert record is not None
    found: Counter[str] = Counter()
    for layer, count in made.items():
        found[plain_name(layer)] += count
    return found, {plain_name(layer): (site.spec.name, site.kinds) for layer, site in record.sites.items()}


def _uncompiled(model: nn.Module, originals: Set[nn.Module]) -> nn.Module:
    """A copy of a model, its parts as they were before ``torch.compile``; what it shares of the ``originals`` is left alone."""
    for module in set(model.modules()) - originals:
        vars(module).pop("_compiled_call_impl", None)
        for name, child in module._modules.items():
            if child is not None and is_optimized_module(child):
                module._modules[name] = unwrap(child)
    return model


def _under_shared_names(user_model: nn.Module, seen: Counter[str], made: Counter[str]) -> set[str]:
    """Names of the layers that a rule keeps dense; what shared code counted for the first of its layers is handed out."""
    from .records import records_of

    dense: set[str] = set()
    for _, record in records_of(user_model):
        for decision in record.decisions:
            settings = dict(record.names_of(decision, user_model))
            dense |= {name for name, s in settings.items() if s.drop_rate == 0}
            first = decision.convolution.layer
            for name in settings:
                given = min(made[name] - seen[name], seen[first] - made[first])
                if name != first and given > 0:
                    seen.update({name: given, first: -given})
    return dense


def arguments_of(model: nn.Module, names: Sequence[str], example_inputs: Any) -> dict[str, tuple[tuple, dict]]:
    """What submodules are called with in a forward pass, the first time; nothing of the model is changed.

    Args:
        names: of the submodules; the empty string for the model.

    Returns:
        Name → positional and keyword arguments, tensors without data on the device ``meta``; those that are not called
        are left out.
    """
    copied = _forced(model, 0.0)
    found: dict[str, tuple[tuple, dict]] = {}

    def blank(value: Any) -> Any:
        return value.detach().to("meta") if isinstance(value, Tensor) else value

    def note(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.setdefault(name, tree_map(blank, (args, kwargs)))

    for name in names:
        copied.get_submodule(name).register_forward_pre_hook(functools.partial(note, name), with_kwargs=True)
    with undone(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a checkpoint's, of inputs without gradients
        call_model(copied, example_inputs)
    return found


def _measured(record: Transformation, met: Transformation, seen: Mapping[str, int], compiled: bool) -> dict[str, MeasuredLayer]:
    """The layers of ``record`` with the calls that its copy ``met`` saw, functional ones that only that has met included.

    Args:
        seen: layer → its backward passes in the sparse step.
        compiled: that step ran compiled code, which need not reach all of them.
    """
    layers = {}
    for layer, site in met.sites.items():
        own = record.sites.get(layer)
        settings = own.settings if own else record.policy.assign({layer: site.kinds}, require_match=False)[layer]
        wanted = [c for c in site.calls or () if c.needs is not None]
        frozen = not any(any(c.needs or ()) for c in wanted)
        # Only those with a backward pass count. A checkpointed call is made again in it, where it counts no second time.
        calls = wanted if frozen or (compiled and not seen.get(layer)) else wanted[: seen.get(layer, 0)]
        layers[layer] = MeasuredLayer(site.spec, site.kinds, settings, tuple(calls), bool(site.calls), site.complex)
    return layers


@contextlib.contextmanager
def _observing(update: Callable[[Any], None]) -> Iterator[None]:
    def observe(layer: str) -> None:
        update([layer])

    observers.append(observe)
    try:
        yield
    finally:
        observers.remove(observe)


def _forced(model: nn.Module, factor: float) -> nn.Module:
    """A copy, sharing tensors, whose factor is fixed, and which notes every call.

    At a factor of one, layers of drop rate zero are made sparse, to be counted.
    """
    copied = shared_copy(model, share_listeners=False)
    run_alone(copied)
    record = transformation_of(copied)
    if record is not None:
        allocation = Allocation(Policy(drop_rate=0.5, schedule={"kind": "constant", "end": factor}))
        record.listen(allocation)
        for site in record.sites.values():
            if factor and site.settings.drop_rate == 0:
                site.settings = replace(site.settings, drop_rate=0.5)
    return copied
