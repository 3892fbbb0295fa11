"""Front end two: ``torch.compile(model, backend="ssprop")``.

Dynamo's graph goes through the passes; AOTAutograd makes the forward of it, in which ``ssprop.conv`` is
``aten.convolution`` again, and the backward, with an ``ssprop.conv_backward`` for each sparse convolution. The forward is
compiled once. The backward is handed out by a :class:`PhaseDispatcher`, which lowers and compiles one graph for each phase
the schedule comes to, the first time it comes to it.
"""

from __future__ import annotations

import functools
import os
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from . import ops
from ._compat import (
    aot_autograd,
    autograd_cache,
    autograd_cache_off,
    compile_fx,
    compile_fx_inner,
    current_compile_id,
    inductor_cache,
    inductor_decompositions,
    inductor_mode_options,
    keep_saved_tensors,
    last_compile,
    make_boxed,
    notice_reset,
    restarts,
)
from .allocation import allocation_for
from .convolutions import LINEAR, ConvArgs, run
from .errors import PolicyError, Problem, SSPropError, cause_of
from .logs import graph_rewritten
from .naming import GraphNames, module_index
from .options import default_policy, forget_files, policy_for, with_known_names
from .passes import (
    Decision,
    Sparsify,
    assign_policy,
    find_convolutions,
    verify,
)
from .passes._graphs import graphs_within
from .passes.lower_backward import backward_nodes
from .passes.sparsify import checkpoint_as_convolutions, fix_choices
from .passes.verify import rewritten_layers
from .phases import PhaseDispatcher, copy_graph, tagged_caches, untagged_caches
from .policy import Policy
from .records import CompiledState, GraphRecord, state_of
from .shared_code import Anchor, GraphInputs, SharedCode, find_anchors
from .survey import assign_checked, convolves, functional_callers, layer_kinds
from .transform import transformation_of

_LAST = (
    "PyTorch compiles no code more often than torch._dynamo.config.recompile_limit says, and has now done so with code that "
    "holds convolutions: whatever needs another compile of it runs eagerly, and trains dense. For model after model in one "
    "process call torch.compiler.reset() before each; otherwise TORCH_LOGS=recompiles tells what changes from call to call"
)
_FAILED = (
    "a graph with the convolutions {} did not compile ({}). If no error follows PyTorch runs it eagerly instead, and then they "
    "train dense: call ssprop_fx.transform(model, policy) first and compile its result, or compile with fullgraph=True to see "
    "the error"
)
_INNER = ("inductor", "aot_eager", "eager")


def ssprop(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    policy: Any = None,
    inner: str = "inductor",
    **_: Any,
) -> Callable[..., Any]:
    """The ``torch.compile`` backend ``"ssprop"``; users name it, nobody calls it.

    Args:
        graph_module: from Dynamo.
        example_inputs: of the graph, from Dynamo.
        options: ``policy`` (a :class:`Policy`, a path or a mapping; the default policy without), ``inner``
            (``inductor``, ``aot_eager`` or ``eager``); everything else is handed to Inductor as a config patch.
        mode: as for Inductor.

    Raises:
        PolicyError: the policy is invalid.
        SSPropError: unknown ``inner``, or the options contradict a model that ``transform`` has rewritten.
    """
    notice_reset(ssprop)
    settings = dict(options or {})
    policy, inner = settings.pop("policy", policy), settings.pop("inner", inner)
    if inner not in _INNER:
        raise SSPropError(f"inner={inner!r} is not known; expected one of {', '.join(_INNER)}")
    settings = with_known_names(settings)
    rewritten, record = rewrite(graph_module, policy)
    try:
        compiled = _compile(rewritten, example_inputs, record, inner, settings, mode)
    except restarts():  # what Dynamo has asked for: it hands over another graph
        record.withdraw()
        raise
    except Exception as error:
        record.withdraw()
        if any(d.sparse for d in record.decisions) and not isinstance(error, SSPropError):
            cause = cause_of(error)
            said = f"{type(cause).__name__}: {cause}".partition("\n")[0]
            warnings.warn(_FAILED.format(", ".join(sorted(record.layers())), said), stacklevel=2)
        raise
    return record.shared.guard(compiled)


ssprop.reset = forget_files  # type: ignore[attr-defined]


def _compile(
    rewritten: GraphModule,
    example_inputs: Sequence[Any],
    record: GraphRecord,
    inner: str,
    settings: dict[str, Any],
    mode: str | None,
) -> Callable[..., Any]:
    if inner == "eager":
        return rewritten
    if inner == "aot_eager":
        if settings or mode:
            raise SSPropError(f"{', '.join(settings) or 'mode'}: options of Inductor, which inner='aot_eager' leaves out")
        dispatcher = functools.partial(PhaseDispatcher, record, compiler=_compile_eager, decompositions={})
        with autograd_cache_off():
            return aot_autograd(
                fw_compiler=functools.partial(_forward_eager, record),
                bw_compiler=dispatcher,
                decompositions={ops.conv: _dense_convolution},
            )(rewritten, example_inputs)
    from . import warm  # imports Inductor

    if mode is not None and mode != "default":
        settings = inductor_mode_options(mode) | settings
    sizes_known = not any(isinstance(value, torch.SymInt) for value in example_inputs)
    stores = bool(record.decisions or rewritten_layers(rewritten)) and sizes_known
    with autograd_cache(stores), tagged_caches(), warm.compiling(record, settings):
        compiled = compile_fx(
            rewritten,
            example_inputs,
            inner_compile=functools.partial(_inner_compile, record, settings),
            config_patches=settings or None,
            decompositions={**inductor_decompositions(), ops.conv: _dense_convolution},
        )
    record.forward_compiles = record.forward_compiles or 1  # by an earlier process
    return compiled


def rewrite(graph_module: GraphModule, policy: Policy | str | dict | None) -> tuple[GraphModule, GraphRecord]:
    """The pipeline: find the convolutions, ask the policy, rewrite, verify.

    Modules may have been renamed, or become part of another model, since the last graph.

    Args:
        policy: as in the options; None is that of a model which ``transform`` has rewritten, else the default policy.
    """
    ops.register_flop_formulas()
    module_index.scan()
    names = GraphNames(module_index, graph_module)
    # a checkpointed block or a compiled region is a graph inside the graph
    inside = graphs_within(graph_module).values()
    graphs = [graph for graph, _ in inside]
    convolutions = [[replace(c, times=t) for c in find_convolutions(graph, names, linear=True)] for graph, t in inside]
    given, policy = policy, policy_for(policy, names.roots.values())
    _refuse_functorch(graphs, any(convolutions))
    transformed = _transformed_policy(graph_module, names)
    if transformed is not None and policy is not None and policy is not transformed:
        raise SSPropError(
            "the model was transformed under one policy and is compiled with another; "
            'leave the policy out of torch.compile\'s options: backend="ssprop" uses that of the model'
        )
    policy = transformed or policy or default_policy()
    state = state_of(policy)
    captured = copy_graph(graph_module)
    if transformed is None:
        _check_rules(list(names.roots.values()), policy, state)
    decisions: list[Decision] = []
    inputs = GraphInputs(graph_module)
    anchors: list[tuple[Anchor, Any]] = []
    for graph, found in zip(graphs, convolutions, strict=True):
        assigned = assign_policy(found, policy) if transformed is None else []
        anchors += find_anchors(graph, assigned, names.owners, inputs)
        chosen = [d for d in assigned if d.sparse or d.convolution.spec is not LINEAR]
        already = rewritten_layers(graph)
        Sparsify(chosen, state.allocation.handle)(graph)
        fix_choices(graph)
        checkpoint_as_convolutions(graph)
        verify(graph, chosen, already)
        decisions += chosen
    roots = [weakref.ref(root) for root in names.roots.values()]

    def meet(root: torch.nn.Module) -> Policy:
        own = policy if any(ref() is root for ref in roots) else _policy_of_another(given, policy, root)
        _check_rules([root], own, state_of(own))
        return own

    shared = SharedCode(anchors, policy, names.index, meet)
    record = GraphRecord(captured, copy_graph(graph_module), decisions, roots, shared)
    record.compile_id = current_compile_id()
    if isinstance(given, Policy) and any(d.sparse for d in decisions):
        given.warn_if_idle(held=True)
    if decisions and last_compile():
        warnings.warn(_LAST, stacklevel=2)
    record.index = state.records[-1].index + 1 if state.records else 0
    state.records = [*(known for known in state.records if known.alive), record]
    graph_rewritten(record.index, record)
    return graph_module, record


def _refuse_functorch(graphs: Sequence[GraphModule], convolves: bool) -> None:
    """An operator with a backward pass of its own cannot take part in what ``torch.func`` makes of a traced forward pass."""
    called = {getattr(node.target, "__name__", "") for graph in graphs for node in graph.graph.nodes}
    if "_jvp_increment_nesting" in called and (convolves or any(map(rewritten_layers, graphs))):
        raise SSPropError(
            "torch.func.jvp of convolutions inside compiled code: the operator has no forward-mode derivative; leave it out of "
            "torch.compile, where ssprop_fx.transform(model, policy) supports it"
        )
    if "_grad_increment_nesting" in called and convolves:
        raise SSPropError(
            "torch.func.grad or vjp of convolutions inside compiled code: call ssprop_fx.transform(model, policy) first and "
            "compile the function of its result"
        )


def _check_rules(roots: Sequence[torch.nn.Module], policy: Policy, state: CompiledState) -> None:
    """Every rule must match something of the models in a graph, even though the graph may hold only parts of them.

    A compiled function may call several models, of which some have no convolution, and rules may be meant for one of them.
    """
    if all(root in state.checked for root in roots):
        return
    found: list[tuple[Problem, ...]] = []
    for root in roots:
        layers, callers = layer_kinds(root, plain=True), functional_callers(root, plain=True)
        if not convolves(layers, callers) and (len(roots) > 1 or not module_index.is_compiled(root)):
            continue
        try:
            assign_checked(root, policy, layers, callers, plain=True)
            found.append(())
        except PolicyError as error:
            found.append(error.problems)
    everywhere = set.intersection(*({_rule_of(p) for p in problems} for problems in found)) if found else set()
    if everywhere:
        raise PolicyError([problem for problem in found[0] if _rule_of(problem) in everywhere])
    state.checked.update(roots)


def _rule_of(problem: Problem) -> str:
    return problem.key.partition(".")[0]


def _policy_of_another(given: Any, policy: Policy, root: torch.nn.Module) -> Policy:
    """The policy of a further model that code compiled under ``policy`` is run for.

    Args:
        given: what the options hold. A model of its own clock reads the file or mapping anew.
    """
    own = policy_for(given, [root]) or policy
    if own.digest != policy.digest:
        what = repr(str(given)) if isinstance(given, (str, os.PathLike)) else "the mapping"
        raise SSPropError(
            f"{what} in torch.compile's options says something else than when {type(root).__name__} was first compiled, and "
            "torch.compile would go on with the code of then: call torch.compiler.reset() before a model is compiled under "
            "a policy that has changed, or hand over a Policy object (ssprop_fx.Policy.load(...))"
        )
    return own


def _transformed_policy(graph_module: GraphModule, names: GraphNames) -> Policy | None:
    for root in names.roots.values():
        record = transformation_of(root)
        if record is not None:
            return record.policy
    for graph, _ in graphs_within(graph_module).values():
        for node in graph.graph.find_nodes(op="call_function", target=ops.conv):
            return allocation_for(node.args[-1]).policy
    return None


def _dense_convolution(input, weight, bias, *rest):
    return run(input, weight, bias, ConvArgs(*rest[:6]))


def _forward_eager(record: GraphRecord, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Any:
    record.graphs.put("forward", lambda: graph_module)
    record.forward_compiles += 1
    return make_boxed(graph_module.forward)


def _compile_eager(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Any:
    return make_boxed(graph_module.forward)


def _inner_compile(
    record: GraphRecord,
    settings: Mapping[str, Any],
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    **kwargs: Any,
) -> Any:
    from .warm import StoredCode, StoredPhases

    backward = bool(kwargs.get("is_backward"))
    if backward:
        keep_saved_tensors()
        if backward_nodes(graph_module):
            return StoredPhases(record, graph_module, example_inputs, kwargs, settings)
        # plain Inductor's code may write over saved tensors, and its cache does not tell
        graph = copy_graph(graph_module)
        with inductor_cache():
            return StoredCode(record, compile_fx_inner(graph_module, example_inputs, **kwargs), lambda: graph, backward)
    graph, start = copy_graph(graph_module), time.perf_counter()
    with inductor_cache(), untagged_caches():  # there is nothing of ours in the graph, and plain Inductor's code serves
        compiled = compile_fx_inner(graph_module, example_inputs, **kwargs)
    record.forward_compiles += 1
    record.seconds["forward"] = time.perf_counter() - start
    return StoredCode(record, compiled, lambda: graph, backward)


__all__ = ["rewrite", "ssprop"]
