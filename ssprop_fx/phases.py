"""A backward pass that compiles itself once for each phase of the schedule."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from . import ops, passes
from ._compat import fake_mode_of, lowering_context, with_own_random_numbers
from .allocation import allocation_for, observers
from .cost import is_number
from .logs import backward_lowered
from .passes import BatchNormSums, ChannelsLastScatter, ChannelsLastSums, LowerBackward, lowering_demands
from .passes._graphs import graphs_within
from .passes.lower_backward import backward_nodes
from .profit import Timing, settle

if TYPE_CHECKING:
    from .records import GraphRecord

events = itertools.count()  # a graph that was made, a backward pass that began
lock = threading.RLock()  # lowering, and unpickling what is lowered, goes one at a time


class LazyGraphs(Mapping[Any, GraphModule]):
    """Graphs by name, each made when somebody first asks for it."""

    def __init__(self) -> None:
        self._makers: dict[Any, Callable[[], GraphModule]] = {}

    def put(self, key: Any, make: Callable[[], GraphModule]) -> None:
        """Have ``make`` called, once, when the graph is asked for."""
        self._makers[key] = functools.cache(make)

    def __getitem__(self, key: Any) -> GraphModule:
        return self._makers[key]()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, key: object) -> bool:
        return key in self._makers


class PhaseDispatcher:
    """A backward callable that compiles itself once for each phase.

    Args:
        graph_module: AOTAutograd's backward graph.
        example_inputs: its fake inputs.
        compiler: (graph, fake inputs) → callable on a list of inputs.
        decompositions: what the compiler expects to have been decomposed.
    """

    def __init__(
        self,
        record: GraphRecord,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        compiler: Callable[..., Any],
        decompositions: Mapping[Any, Any],
    ) -> None:
        self.graph_module, self.example_inputs = graph_module, list(example_inputs)
        self.compiler, self.decompositions = compiler, decompositions
        self.fake_mode = fake_mode_of(self.example_inputs)
        self.demands = lowering_demands(graph_module)
        nodes = backward_nodes(graph_module)
        self.settings = {name: node.args[ops.BACKWARD_SETTINGS_AT :] for name, (node, _) in nodes.items()}
        self.times = {name: times for name, (_, times) in nodes.items()}
        self.symbolic = any(not is_number(size) for value in self.example_inputs for size in _sizes_of(value))
        self._begin(record)

    def _begin(self, record: GraphRecord) -> None:
        self._boxed_call = True  # on the instance: wrappers copy it from there
        self.record = record
        self._sizes: list[Any] = []
        self.allocations = [allocation_for(h) for h in dict.fromkeys(s[-1] for s in self.settings.values())]
        self.losses: dict[tuple[float, ...], dict[str, Timing]] = {}  # by factors and node: why it stays dense
        self.by_factor: dict[tuple[float, ...], Callable[..., Any]] = {}
        self.by_count: dict[tuple[int, ...], Callable[..., Any]] = {}

    def __call__(self, inputs: list[Any]) -> Any:
        self.record.ran = next(events)
        if self.symbolic:
            self._sizes = [tuple(value.shape) if isinstance(value, torch.Tensor) else value for value in inputs]
        factors = tuple(self.record.clock_of(a.policy).quantized_factor for a in self.allocations)
        run = self.by_factor.get(factors)
        if run is None:
            with lock:
                run = self.by_factor.get(factors) or self._enter(factors)
        for observe in observers:
            for name, settings in self.settings.items():
                for _ in range(self.times[name]):
                    observe(settings[0])
        return run(inputs)

    def lower(self, counts: Mapping[str, int]) -> GraphModule:
        """The backward graph for a phase, as the compiler gets it.

        Args:
            counts: name of a node → channels to keep.
        """
        lowered = copy_graph(self.graph_module)
        with lowering_context(self.fake_mode):
            LowerBackward(counts, self.decompositions)(lowered)
            if self.decompositions:  # for Inductor
                for graph, _ in graphs_within(lowered).values():
                    ChannelsLastScatter()(graph)
                    BatchNormSums()(graph)
                    ChannelsLastSums()(graph)
                    with_own_random_numbers(graph)
        return lowered

    def _enter(self, factors: tuple[float, ...]) -> Callable[..., Any]:
        self.record.dispatcher = self
        if "backward" not in self.record.graphs:
            self.record.graphs.put("backward", lambda: self.graph_module)
        counts = self.counts(factors)
        key = tuple(counts.values())
        self.record.phases[factors] = key
        if key not in self.by_count:
            start = time.perf_counter()
            run = self._load(key)
            if run is not None:
                self.record.lowered.put(key, lambda: self.lower(counts))
            else:
                lowered = self.lower(counts)
                given = copy_graph(lowered)  # compilers change what they are given
                # the compiler's cache knows the names of our operators, not what they do in this version
                with lowering_context(self.fake_mode), tagged_caches():
                    run = self.compiler(lowered, self.example_inputs)
                self.record.lowered.put(key, lambda: given)
                self._keep(key, run)
            self.by_count[key] = run
            seconds = self.record.seconds[f"backward {factors}"] = time.perf_counter() - start
            backward_lowered(self.record.index, self.record, factors, lambda: self.record.lowered[key], seconds)
        run = self.by_factor[factors] = self.by_count[key]
        return run

    def symbols(self) -> dict[Any, int]:
        """The values of symbolic sizes in the last run."""
        found = {}
        for example, sizes in zip(self.example_inputs, self._sizes, strict=False):
            for symbol, size in zip(_sizes_of(example), sizes if isinstance(sizes, tuple) else [sizes], strict=False):
                if not is_number(symbol) and symbol.node.expr.is_symbol:
                    found[symbol.node.expr] = int(size)
        return found

    def _load(self, key: tuple[int, ...]) -> Callable[..., Any] | None:
        """The compiled code of a phase from an earlier process, where there is some."""

    def _keep(self, key: tuple[int, ...], run: Callable[..., Any]) -> None:
        """Note where the compiled code of a phase lies, for a later process."""

    def counts(self, factors: tuple[float, ...]) -> dict[str, int]:
        """Channels to keep, by node, at one factor per allocation."""
        factor_of = {a.handle: f for a, f in zip(self.allocations, factors, strict=True)}
        calls: dict[tuple, list[str]] = {}  # of each layer; those that choose from as many channels decide together
        for name, demand in self.demands.items():
            calls.setdefault((*self.settings[name], demand.channels), []).append(name)
        demands = []
        for names in sorted(calls.values(), key=lambda names: self.settings[names[0]][0]):  # by layer, as in eager mode
            first, together = self.demands[names[0]], [self.demands[name] for name in names]
            demands.append(
                replace(
                    first,
                    flops=sum(d.flops for d in together),
                    drop_rate=first.drop_rate * factor_of[self.settings[names[0]][-1]],
                    calls=tuple(call for d in together for call in d.calls),
                )
            )
        counts, losses = settle(demands, any(a.measures for a in self.allocations))
        of = {name: names[0] for names in calls.values() for name in names}
        self.losses[factors] = {name: losses[first] for name, first in of.items() if first in losses}
        return {name: counts[of[name]] for name in self.settings}


def _sizes_of(value: Any) -> Sequence[Any]:
    return value.shape if isinstance(value, torch.Tensor) else [value]


@contextlib.contextmanager
def tagged_caches() -> Iterator[None]:
    """Keep what PyTorch's caches hold for us apart from everything else: plain Inductor's, another version's."""
    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=f"{config.cache_key_tag} {_digest()}".lstrip()):
        yield


@contextlib.contextmanager
def untagged_caches() -> Iterator[None]:
    """Inside :func:`tagged_caches`: the caches as everybody has them."""
    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=config.cache_key_tag.removesuffix(_digest()).rstrip()):
        yield


@functools.cache
def _digest() -> str:
    """Of the package's source."""
    found = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(passes.__file__).parent):  # installed, the second lies inside the first
        for path in sorted(folder.rglob("*.py")):
            found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"ssprop-fx {found.hexdigest()[:16]}"


def copy_graph(graph_module: GraphModule) -> GraphModule:
    """A copy of a graph module, and of the graphs inside it, that passes may rewrite; it shares parameters and constants."""
    graph = torch.fx.Graph()
    output = graph.graph_copy(graph_module.graph, {}, return_output_node=True)
    value, old_output = output  # type: ignore[misc]
    graph.output(value).meta = copy.copy(old_output.meta)  # type: ignore[union-attr]
    graph._codegen = graph_module.graph._codegen
    result = GraphModule(graph_module, graph)
    result.meta = copy.copy(graph_module.meta)
    inner = {child: copy_graph(child) for child in result.children() if isinstance(child, GraphModule)}
    for name, child in result._modules.items():
        if child in inner:
            result._modules[name] = inner[child]
    return result
