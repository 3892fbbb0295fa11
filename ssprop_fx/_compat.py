"""Every private PyTorch name that the package uses. ``tests/test_compat.py`` has a canary for each.

What only the backend needs is imported when it is first used: importing Inductor takes seconds.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch._C._functorch import maybe_current_level as _maybe_current_level
from torch.autograd import forward_ad as _forward_ad

# Names of their own rather than functions around them: they are asked at every convolution call.
function_modes = torch._C._len_torch_function_stack

# How many modes hear of every operation: counters, tracers, fake tensors.
dispatch_modes = torch._C._len_torch_dispatch_stack

# Whether autocast is on for any kind of device, asked as often.
any_autocast = torch._C._is_any_autocast_enabled

# What ``with torch.autocast(...)`` is in a graph.
enter_autocast, exit_autocast = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


def functorch_active() -> bool:
    """Whether ``torch.func`` (grad, vmap, …) is transforming what runs now."""
    return _maybe_current_level() is not None


def vmapped_samples(tensor: torch.Tensor) -> int:
    """How many samples of ``vmap`` a tensor stands for, of one inside another all of them; one outside of any."""
    functorch, samples = torch._C._functorch, 1
    while functorch.is_functorch_wrapped_tensor(tensor):
        inner = functorch.get_unwrapped(tensor)
        if functorch.is_batchedtensor(tensor):
            samples *= inner.shape[functorch.maybe_get_bdim(tensor)]
        tensor = inner
    return samples


def requires_grad(tensor: torch.Tensor) -> bool:
    """Whether a gradient of a tensor is asked for, also outside of the transformations of ``torch.func`` that run now."""
    while not tensor.requires_grad and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether a compiler records what is done with ``tensor``; before 2.13 it does not say so inside ``autograd.grad``."""
    return torch.compiler.is_compiling() or torch._guards.detect_fake_mode((tensor,)) is not None


def in_batch_of_gradients(grad: torch.Tensor) -> bool:
    """Whether a gradient is one of those that ``torch.autograd.grad(is_grads_batched=True)`` computes together."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)


def forward_ad_active() -> bool:
    """Whether forward-mode differentiation is on (dual numbers)."""
    return _forward_ad._current_level >= 0


@contextlib.contextmanager
def without_gradient_hooks(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Let no hook hear of the gradients of ``tensors``, which are leaves: some train the model there and then."""
    hooks = [(t, name, getattr(t, name)) for t in tensors for name in ("_backward_hooks", "_post_accumulate_grad_hooks")]
    hooks = [(tensor, name, own) for tensor, name, own in hooks if own]
    for tensor, name, _ in hooks:
        setattr(tensor, name, {})
    try:
        yield
    finally:
        for tensor, name, own in hooks:
            setattr(tensor, name, own)


def keeps_graph() -> bool:
    """Whether the backward pass that runs now was told to ``retain_graph``."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def wants_gradient_at(node: Any) -> bool:
    """Whether the backward pass that runs now uses the gradient that it would hand to a node of the graph."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that autograd.grad was asked for
        return True


def saved_tensors_hooked() -> bool:
    """Whether what is saved for the backward pass goes through hooks: checkpointing, offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def autocast_disabled() -> contextlib.AbstractContextManager[None]:
    """No autocast, for any kind of device."""
    return torch._C._DisableAutocast()


def in_function_forward() -> bool:
    """Whether the forward of an ``autograd.Function`` runs now: it turns off forward mode, too, which ``no_grad`` does not."""
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


def in_backward() -> bool:
    """Whether a backward pass is what runs now, in this thread."""
    return running_backward() != -1


def running_backward() -> int:
    """A number of the backward pass that runs now, in this thread; -1 outside of any."""
    return torch._C._current_graph_task_id()


def constant_when_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result`` without importing the compiler, which that does."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def never_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that Dynamo calls where it stands, instead of tracing what it does as a part of its caller's code."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


# Whether a function that is constant when traced may be given any object, which is then known by its identity. Older releases
# fail on what is not a number, a text or the like. (Known of 2.15, and that 2.11 fails.)
constants_of_objects = torch.torch_version.TorchVersion(torch.__version__) >= "2.15"


def failed_operation(problem: BaseException) -> BaseException | None:
    """The error of an operation of the user's on which Dynamo gave up tracing; None if ``problem`` is anything else."""
    exceptions = sys.modules.get("torch._dynamo.exc")
    if exceptions is None or not isinstance(problem, exceptions.TorchRuntimeError):
        return None
    found: BaseException | None = problem
    while found is not None and (found.__cause__ is not None or type(found).__module__.startswith("torch._dynamo.")):
        found = found.__cause__ or found.__context__
    return found


def is_optimized_module(module: Any) -> bool:
    """Whether a module is what ``torch.compile(module)`` returned (asked without importing the compiler)."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def is_compiled(module: Any) -> bool:
    """Whether a module, or one inside it, is compiled: ``torch.compile(module)`` or ``module.compile()``."""
    return any(is_optimized_module(m) or called_compiled(m) for m in module.modules())


def called_compiled(module: Any) -> bool:
    """Whether a module was compiled in place: ``module.compile()``."""
    return getattr(module, "_compiled_call_impl", None) is not None


def run_alone(model: torch.nn.Module) -> None:
    """Let each ``DistributedDataParallel`` in a model just call what it wraps, without a word to the other processes."""
    for module in model.modules():
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            vars(module)["_pre_forward"] = lambda *inputs, **kwargs: (inputs, kwargs)
            vars(module)["_post_forward"] = lambda output: output


def aot_autograd(**kwargs: Any) -> Callable[..., Any]:
    """Dynamo's wrapper of AOTAutograd: partitioning and boxed calls as the built-in backends get them."""
    from torch._dynamo.backends.common import aot_autograd as implementation
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    return implementation(partition_fn=min_cut_rematerialization_partition, keep_inference_input_mutations=True, **kwargs)


def graph_argument(placeholder: Any) -> tuple[str, Any]:
    """What an input of Dynamo's graph stands for, while the backend runs: its source as text, and the tensor or None."""
    argument = placeholder.meta.get("grapharg")
    source, example = getattr(argument, "source", None), getattr(argument, "example", None)
    name = getattr(source, "name", "")
    return name() if callable(name) else name, example if isinstance(example, torch.Tensor) else None


def make_boxed(function: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    """A callable that takes one list of arguments, and may free them."""
    from functorch.compile import make_boxed_func

    return make_boxed_func(function)


@contextlib.contextmanager
def autograd_cache_off() -> Iterator[None]:
    """AOTAutograd's cache does not hash what the backend does, and once served plain Inductor's artifact to it."""
    import torch._functorch.config as config

    with config.patch(enable_autograd_cache=False):
        yield


@contextlib.contextmanager
def autograd_cache(stores: bool) -> Iterator[None]:
    """AOTAutograd's cache, if the user has it on, keeping the objects that the compilers returned.

    They are kept when the forward has been compiled, so the backward's compiler, too, is called then. What the forward
    saves is not given away to the backward's code for its own results, which would be settled at the first backward pass
    and hold for the later ones; :func:`keep_saved_tensors` tells AOTAutograd so.

    Args:
        stores: False leaves the cache off.
    """
    import torch._dynamo.config as dynamo_config
    import torch._functorch.config as config

    wanted = {"bundled_autograd_cache": True, "force_non_lazy_backward_lowering": True}
    if not stores or dynamo_config.caching_precompile or not all(hasattr(config, name) for name in wanted):
        wanted = {"enable_autograd_cache": False}
    with config.patch({**wanted, "donated_buffer": False}):
        yield


def keep_saved_tensors() -> None:
    """Say of the backward that is being compiled that it leaves the saved tensors as they are: it may be run again.

    Without it AOTAutograd refuses ``retain_graph``, as it does for a backward of which it does not know.
    """
    context = torch._guards.TracingContext.try_get()
    metadata = getattr(context, "fw_metadata", None)
    if metadata is not None:
        metadata.bw_donated_idxs = []


@contextlib.contextmanager
def inductor_cache() -> Iterator[None]:
    """Inductor's own cache, inside :func:`autograd_cache`, which leaves it out."""
    import torch._functorch.config as config

    name = "bundled_autograd_cache"
    with config.patch({name: False} if hasattr(config, name) else {}):
        yield


def output_code() -> type:
    """The base class of what AOTAutograd's cache can keep."""
    from torch._inductor.output_code import OutputCode

    return OutputCode


def refuse_to_store(reason: str) -> NoReturn:
    """Have AOTAutograd's cache not keep what it is about to.

    Raises:
        BypassAOTAutogradCache: which that cache expects.
    """
    from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache

    raise BypassAOTAutogradCache(reason)


def code_key(compiled: Any) -> tuple[str, str | None]:
    """Under which key, and for which guards, Inductor's cache holds compiled code.

    Raises:
        BypassAOTAutogradCache: it does not.
    """
    key = getattr(compiled, "_fx_graph_cache_key", None)
    if key is None:
        refuse_to_store("Inductor's cache does not hold the compiled code")
    return key, getattr(compiled, "guards_expr", None)


def load_code(code: tuple[str, str | None], example_inputs: Sequence[Any], options: Mapping[str, Any], backward: bool) -> Any:
    """Compiled code from Inductor's cache.

    Args:
        code: from :func:`code_key`.
        example_inputs: of the graph, fake.
        options: of the compile, as AOTAutograd's cache hands them to what it loads.

    Raises:
        FXGraphCacheMiss: it is not there any more.
    """
    from torch._functorch._aot_autograd.aot_autograd_result import CompiledBackward, CompiledForward

    stored: Any = CompiledBackward((code[0], []), code[1], [], 0) if backward else CompiledForward((code[0], []), code[1])
    return stored.post_compile(stored.load(example_inputs), {**options, "is_backward": backward})


def pickle_graph(graph_module: torch.fx.GraphModule) -> bytes:
    """A graph module, with the fake values of its nodes, as bytes."""
    from torch.fx._graph_pickler import GraphPickler, Options

    return GraphPickler.dumps(graph_module, Options(ops_filter=None))


def unpickle_graph(data: bytes, fake_mode: Any) -> Any:
    """The inverse of :func:`pickle_graph`; fake values are of ``fake_mode``."""
    from torch.fx._graph_pickler import GraphPickler

    return GraphPickler.loads(data, fake_mode)


def inductor_folder() -> Path:
    """Where Inductor keeps its cache."""
    from torch._inductor.runtime.runtime_utils import cache_dir

    return Path(cache_dir())


def inductor_settings(settings: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Inductor's settings with ``settings`` among them, for the time being."""
    import torch._inductor.config as config

    return config.patch(dict(settings))


def inductor_state() -> str:
    """All that decides what Inductor makes of a graph, as a text."""
    import torch._inductor.config as config

    flags = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(), torch.get_num_threads()
    return f"{sorted(config.save_config_portable(ignore_private_configs=False).items())} {flags}"


def compile_fx(*args: Any, **kwargs: Any) -> Any:
    """Inductor, from a Dynamo graph."""
    from torch._inductor.compile_fx import compile_fx as implementation

    return implementation(*args, **kwargs)


def compile_fx_inner(*args: Any, **kwargs: Any) -> Any:
    """Inductor, from a graph of aten operations and of operators of ours that it calls as they are.

    Newer releases hand the decomposition table down as ``get_decomp_fn`` and make it a part of the cache key; ours cannot
    be pickled, and is not needed any more, so the usual one takes its place and the graph is cached.
    """
    from torch._inductor.compile_fx import compile_fx_inner as implementation
    from torch._inductor.decomposition import select_decomp_table

    if "get_decomp_fn" in kwargs:
        kwargs["get_decomp_fn"] = select_decomp_table
    return implementation(*args, **kwargs)


def inductor_decompositions() -> Mapping[Any, Callable[..., Any]]:
    """The decompositions that Inductor expects to have been applied to an aten graph."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def translate_checkpoint(graph_module: torch.fx.GraphModule, translate: Callable[..., tuple[Any, ...]]) -> None:
    """Ask the policy of a selective checkpoint, if the graph is the body of one, about the call that ``translate`` gives.

    Args:
        translate: (operator, *arguments) → (operator, *arguments).
    """
    context_fn = graph_module.meta.get("_checkpoint_context_fn")
    if context_fn is None:
        return

    def asked(policy: Callable[..., Any]) -> Callable[..., Any]:
        return lambda context, *call, **kwargs: policy(context, *translate(*call), **kwargs)

    def contexts() -> tuple[Any, Any]:
        pair = context_fn()
        for mode in pair:
            if callable(getattr(mode, "policy_fn", None)):
                mode.policy_fn = asked(mode.policy_fn)
        return pair

    if hasattr(context_fn, "cache_hash"):
        contexts.cache_hash = context_fn.cache_hash  # type: ignore[attr-defined]
    graph_module.meta["_checkpoint_context_fn"] = contexts


def with_own_random_numbers(graph_module: torch.fx.GraphModule) -> None:
    """Random numbers as Inductor makes them, which it expects to find in the graphs that it compiles; in a lowering context."""
    from torch._inductor.fx_passes.replace_random import replace_random_passes

    replace_random_passes(graph_module)


def in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, which Inductor is to keep in memory as its strides say, for all of its readers."""
    return memory_order_operator()(tensor, tensor.stride())


def memory_order_operator() -> Callable[[torch.Tensor, Sequence[int]], torch.Tensor]:
    """(tensor, strides) → the tensor, which Inductor is to keep in memory in the order of these strides."""
    from torch._inductor.inductor_prims import force_stride_order

    return force_stride_order


def gradient_format(input: torch.Tensor, weight: torch.Tensor, args: Sequence[Any]) -> torch.memory_format:
    """The memory format that ``aten.convolution_backward`` gives the input's gradient."""
    stride, padding, dilation, transposed, output_padding, groups = args
    backend = torch._C._select_conv_backend(
        input, weight, None, list(stride), list(padding), list(dilation), transposed, list(output_padding), groups, None
    )
    return torch._C._conv_determine_backend_memory_format(input, weight, backend)


def inductor_options() -> Collection[str]:
    """The names of Inductor's settings."""
    return torch._inductor.list_options()


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """The settings that a ``mode`` of ``torch.compile`` stands for."""
    return torch._inductor.list_mode_options(mode)


def fake_mode_of(inputs: Sequence[Any]) -> Any:
    """The FakeTensorMode of a compile's example inputs."""
    from torch._dynamo.utils import detect_fake_mode

    return detect_fake_mode(inputs)


def current_compile_id() -> Any:
    """Dynamo's name for the compile that is going on, ``0/1``: the frame, and which compile of it; None outside of one."""
    return torch._guards.CompileContext.current_compile_id()


def last_compile() -> bool:
    """Whether Dynamo gives the code that it compiles now up rather than compile it once more."""
    compile_id = current_compile_id()
    attempt = compile_id.frame_compile_id if compile_id is not None else None
    return attempt is not None and attempt + 1 >= torch._dynamo.config.recompile_limit


def restarts() -> type[BaseException]:
    """What a backend raises for Dynamo to trace again: nothing has failed."""
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis

    return TensorifyScalarRestartAnalysis


def notice_reset(backend: Callable[..., Any]) -> None:
    """Have the next ``torch.compiler.reset()`` call ``backend.reset()``.

    It asks the backends that were given to torch.compile since the last one, and code compiled earlier may be compiled again.
    """
    torch._dynamo.eval_frame.cached_backends.setdefault(id(backend), backend)


def trace_artifact(name: str, payload: Callable[[], str], compile_id: Any) -> None:
    """Put a text into the structured trace (``TORCH_TRACE``) as an artifact of a compile; tlparse shows it under its name."""
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=payload,
        expect_trace_id=False,
        compile_id=compile_id,
    )


@contextlib.contextmanager
def lowering_context(fake_mode: Any) -> Iterator[None]:
    """The state in which Inductor expects to compile, for a compile that happens while the model runs."""
    from torch._dynamo.convert_frame import compile_lock
    from torch._guards import TracingContext, tracing
    from torch._inductor.virtualized import V

    with (
        compile_lock,
        torch._C._DisableAutocast(),
        tracing(TracingContext(fake_mode)),
        V.set_fake_mode(fake_mode),
    ):
        yield
