"""What is logged of a compile: a line for each rewritten graph, the graphs, and entries for tlparse.

Loggers are named as the modules, under ``ssprop_fx``, and quiet by default. ``TORCH_LOGS="ssprop_fx"`` or
``logging.getLogger("ssprop_fx").setLevel(logging.INFO)`` shows the lines, ``TORCH_LOGS="+ssprop_fx"`` the graphs, too, as
PyTorch shows those of its own artifacts. With ``TORCH_TRACE=directory`` the graphs are artifacts of their compile in the
trace, which tlparse lays out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch.fx import GraphModule

from ._compat import trace_artifact

if TYPE_CHECKING:
    from .records import GraphRecord

logger = logging.getLogger(__name__)


def graph_rewritten(number: int, record: GraphRecord) -> None:
    """Say what the passes did to a graph of Dynamo's.

    Args:
        number: of the graph, counted under its policy.
    """
    sparse = sum(d.sparse for d in record.decisions)
    logger.info("graph %d: %d of %d convolutions rewritten", number, sparse, len(record.decisions))
    _graph(f"graph {number}, captured", lambda: record.captured, record)
    _graph(f"graph {number}, rewritten", lambda: record.rewritten, record)


def backward_lowered(
    number: int, record: GraphRecord, factors: Sequence[float], graph: Callable[[], GraphModule], seconds: float
) -> None:
    """Say that a backward graph was lowered and compiled for a phase.

    Args:
        factors: of the phase, one for each policy state in the graph.
        graph: makes the lowered graph.
        seconds: that it took.
    """
    phase = ", ".join(f"{factor:g}" for factor in factors)
    logger.info("graph %d: backward graph of factor %s compiled in %.1f s", number, phase, seconds)
    _graph(f"graph {number}, backward, factor {phase}", graph, record)


def _graph(title: str, graph: Callable[[], GraphModule], record: GraphRecord) -> None:
    def code() -> str:
        return graph().print_readable(print_output=False, include_stride=True, include_device=True)

    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s", f"SSPROP GRAPH\n ===== {title} =====\n {code()}")
    name = "ssprop_" + title.replace(", ", "_").replace(" ", "_")
    trace_artifact(name, code, record.compile_id)


__all__ = ["backward_lowered", "graph_rewritten"]
