"""What a warm start reads instead of making it: AOTAutograd's work on a graph, and the compiled code of every phase.

AOTAutograd's cache keeps for the next process how a graph is called and what its forward and backward compiled to. Its key is
the graph as the backend hands it over, in which every rewritten convolution names its layer, its settings and its policy,
and, for us, a digest of this package's source. What it keeps of ours is :class:`StoredCode` and :class:`StoredPhases`: the
keys of code that lies in Inductor's own cache, and the graphs, for reports and for phases that are new. Which code belongs
to which phase of a backward is noted in a file for each, in Inductor's folder.

Importing this brings Inductor, which takes seconds; the backend does so when it first compiles with it.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ._compat import (
    code_key,
    compile_fx_inner,
    fake_mode_of,
    inductor_decompositions,
    inductor_folder,
    inductor_settings,
    inductor_state,
    load_code,
    lowering_context,
    output_code,
    pickle_graph,
    refuse_to_store,
    unpickle_graph,
)
from .files import write_json
from .phases import PhaseDispatcher, lock

if TYPE_CHECKING:
    from .records import GraphRecord

OutputCode: Any = output_code()

logger = logging.getLogger(__name__)

_LIVE = {"cudagraphs", "boxed_forward_device_index", "get_decomp_fn"}  # options of a compile that are no plain values

_compiling: contextvars.ContextVar[tuple[GraphRecord, Mapping[str, Any]]] = contextvars.ContextVar("ssprop_compiling")


@contextlib.contextmanager
def compiling(record: GraphRecord, settings: Mapping[str, Any]) -> Iterator[None]:
    """Say for which graph, and with which of Inductor's settings, a compile goes on: what is loaded meanwhile belongs to it."""
    token = _compiling.set((record, settings))
    try:
        yield
    finally:
        _compiling.reset(token)


class StoredCode(OutputCode):
    """A compiled forward, or a backward without a sparse convolution, that AOTAutograd's cache can keep.

    Args:
        graph: makes the graph that was compiled.
    """

    def __init__(self, record: GraphRecord, compiled: Callable[..., Any], graph: Callable[[], Any], backward: bool) -> None:
        self.backward = backward
        self._begin(record, compiled, graph)

    def _begin(self, record: GraphRecord, compiled: Callable[..., Any], graph: Callable[[], Any]) -> None:
        self._boxed_call = True
        self.record, self.compiled, self.graph = record, compiled, graph
        if not self.backward:
            record.graphs.put("forward", graph)

    def __call__(self, inputs: Sequence[Any]) -> Any:
        if self.backward and "backward" not in self.record.graphs:  # a backward is one once it has run
            self.record.graphs.put("backward", self.graph)
        return self.compiled(inputs)

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """Inductor's own cache keeps the kernels."""

    def prepare_for_serialization(self) -> None:
        """Reduce this object, a copy, to what can be pickled."""
        stored = {"code": code_key(self.compiled), "pickled": pickle_graph(self.graph())}
        self.__dict__ = {"backward": self.backward, **stored}

    def post_compile(self, example_inputs: Sequence[Any], constants: Any, graph_kwargs: Mapping[str, Any]) -> None:
        """Take the code from Inductor's cache, after a load."""
        start = time.perf_counter()
        record, _ = _compiling.get()
        compiled = load_code(self.__dict__.pop("code"), example_inputs, graph_kwargs, self.backward)
        pickled = self.__dict__.pop("pickled")
        self._begin(record, compiled, functools.partial(unpickle_graph, pickled, fake_mode_of(example_inputs)))
        if not self.backward:
            record.seconds["forward"] = time.perf_counter() - start


class StoredPhases(PhaseDispatcher, OutputCode):
    """A :class:`PhaseDispatcher` that AOTAutograd's cache can keep, and that notes where the code of its phases lies.

    Args:
        options: of the compile, as Inductor got them.
        settings: of Inductor, that the user asked for.
    """

    def __init__(
        self,
        record: GraphRecord,
        graph_module: Any,
        example_inputs: Sequence[Any],
        options: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        compiler = functools.partial(_compile, dict(options), settings)
        super().__init__(record, graph_module, example_inputs, compiler, inductor_decompositions())
        self.options, self.inductor = dict(options), settings
        self.loads_with: tuple[Sequence[Any], Mapping[str, Any]] | None = None
        self.identity = uuid.uuid4().hex
        self.stored = [False]  # whether the cache has it; a list, for the copy that is stored to tell this one

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """Inductor's own cache keeps the kernels."""

    def prepare_for_serialization(self) -> None:
        """Reduce this object, a copy, to what can be pickled."""
        options = {k: None if k in _LIVE else v for k, v in self.options.items()}
        if any(type(v) not in (type(None), bool, int, str, list, tuple) for v in options.values()):
            refuse_to_store("options of the compile that are not known")
        strides = [value.stride() if isinstance(value, Tensor) else None for value in self.example_inputs]
        kept = {k: getattr(self, k) for k in ("identity", "demands", "settings", "times", "symbolic")}
        graph, stored = pickle_graph(self.graph_module), self.stored
        self.__dict__ = {**kept, "options": options, "strides": strides, "graph": graph}
        stored[0] = True

    def post_compile(self, example_inputs: Sequence[Any], constants: Any, graph_kwargs: Mapping[str, Any]) -> None:
        """Take the place of the dispatcher that a compile would have made, after a load."""
        record, settings = _compiling.get()
        options = {k: graph_kwargs.get(k) if k in _LIVE else v for k, v in self.options.items()}
        self.compiler, self.decompositions = functools.partial(_compile, options, settings), inductor_decompositions()
        self.options, self.inductor, self.loads_with = options, settings, (example_inputs, graph_kwargs)
        self.fake_mode, self.stored = fake_mode_of(example_inputs), [True]
        self._begin(record)

    def __getattr__(self, name: str) -> Any:
        # the graph takes half a second to unpickle, and a known phase does without
        if name not in ("graph_module", "example_inputs"):
            raise AttributeError(name)
        with lock:  # a report may ask while a backward pass runs
            if name not in self.__dict__:
                if "graph" not in self.__dict__:
                    raise AttributeError(name)
                graph_module = unpickle_graph(self.graph, self.fake_mode)
                values = [node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder")]
                # what the forward saves lies in memory as its compiler chose, not as it was traced
                self.example_inputs = [
                    value if stride is None or stride == value.stride() else value.as_strided(value.shape, stride)
                    for value, stride in zip(values, self.strides, strict=True)
                ]
                self.graph_module = graph_module
                del self.graph
            return self.__dict__[name]

    def _load(self, key: tuple[int, ...]) -> Callable[..., Any] | None:
        if self.loads_with is None:
            return None
        example_inputs, graph_kwargs = self.loads_with
        try:
            note = json.loads(self._note(key).read_text())
            with inductor_settings(self.inductor), lowering_context(self.fake_mode):
                return load_code((note["key"], note["guards"]), example_inputs, graph_kwargs, backward=True)
        except Exception as problem:  # whatever it is, the phase can be compiled
            logger.info("compiled code of a phase is not taken from the cache: %s", problem)
            return None

    def _keep(self, key: tuple[int, ...], run: Callable[..., Any]) -> None:
        if not self.stored[0]:  # nobody would ever look
            return
        try:
            code, guards = code_key(run)
            write_json(self._note(key), {"key": code, "guards": guards})
        except Exception as problem:  # it is for the next process, and this one goes on
            logger.info("compiled code of a phase is not noted in the cache: %s", problem)

    def _note(self, key: tuple[int, ...]) -> Path:
        with inductor_settings(self.inductor):
            name = hashlib.sha256(f"{key} {inductor_state()}".encode()).hexdigest()
        return inductor_folder() / "ssprop_fx" / self.identity / f"{name}.json"


def _compile(options: Mapping[str, Any], settings: Mapping[str, Any], graph_module: Any, example_inputs: Sequence[Any]) -> Any:
    with inductor_settings(settings):
        return compile_fx_inner(graph_module, example_inputs, **options)


__all__ = ["StoredCode", "StoredPhases", "compiling"]
