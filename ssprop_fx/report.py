"""The report: one row per convolution, totals, the schedule's other steps, and the graphs behind them."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import gcd, lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cost import Call, total_bytes, total_flops
from .coverage import Measurement
from .dataflow import Capture, operations, to_networkx
from .errors import SSPropError, nearest
from .masking import is_masked
from .policy import Policy
from .rows import DENSE_STEP, KEEPS_ALL, LOSES, Phase, Plan, Row, markdown_table, of_a_step, text_table
from .summary import summarized

if TYPE_CHECKING:
    import networkx
    from torch.fx import GraphModule


_PHASES = 128


class _NoPlan:
    def __call__(self, factor: float) -> Mapping[str, Sequence[int]]:
        return {}

    def losses(self, factor: float) -> Mapping[str, str]:
        return {}


@dataclass(frozen=True, repr=False)
class Report:
    """What was done to a model, layer by layer, at one step of the schedule. ``print`` it.

    A report is a snapshot: training on, or stepping the policy, changes nothing in it. :meth:`at` gives other steps.

    Attributes:
        model: class name of the model.
        front_end: ``transform``, ``backend``, or ``policy`` before either.
        policy: the policy in force.
        step, factor: the step that ``kept``, ``flops_now`` and ``grad_bytes_now`` are of, and the schedule's factor there.
        rows: one per convolution, in the model's order.
        measurement: counted convolution backwards of one step, if example inputs were given.
        calls: layer → its calls in a step, as far as they are known.
        quantized: whether factors are rounded to the schedule's ``levels``, as compiled code does.
        unmatched: of each rule that may match functional calls and, once a step has run, matches nothing, what is wrong.

    Examples:
        >>> import torch, ssprop_fx
        >>> policy = ssprop_fx.Policy(drop_rate=0.5, schedule={"kind": "bar", "period": 2})
        >>> model = ssprop_fx.transform(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), policy)
        >>> report = ssprop_fx.inspect(model, torch.randn(2, 3, 8, 8))
        >>> report.at(0)["0"].kept, report.at(1)["0"].kept
        (8, 4)
        >>> report.conv_flops  # of a weight gradient: 2 · 2·8·6·6 · 3·3·3
        {'dense': 31104, 'now': 31104, 'mean': 23328.0}
    """

    model: str
    front_end: str
    policy: Policy
    step: int
    factor: float
    rows: tuple[Row, ...]
    measurement: Measurement | None = None
    calls: Mapping[str, Sequence[Call]] = field(default_factory=dict, compare=False)
    quantized: bool = False
    unmatched: tuple[str, ...] = ()
    _plan: Plan = field(default_factory=_NoPlan, compare=False)
    _captures: Callable[[], list[Capture]] = field(default=list, compare=False)

    # --- numbers

    @property
    def coverage(self) -> float:
        """Share of the convolutions that are rewritten; of the counted backward calls where they were measured."""
        if self.measurement is not None:
            return self.measurement.coverage
        return sum(r.rewritten for r in self.rows) / len(self.rows) if self.rows else 1.0

    @property
    def flops_dense(self) -> int:
        """FLOPs of all dense convolution backward passes of a step, as far as shapes are known."""
        return sum(r.flops_dense or 0 for r in self.rows) + self._missed_flops

    @property
    def flops_now(self) -> int:
        """The same at the kept counts of :attr:`step`."""
        return sum(r.flops_now or 0 for r in self.rows) + self._missed_flops

    @property
    def flops_mean(self) -> float:
        """The same, mean over the steps of :attr:`cycle`."""
        return sum(p.share * p.flops for p in self.phases)

    @property
    def _missed_flops(self) -> int:
        """Measured FLOPs of convolution backwards that no row stands for: dense ones of layers that were not reached."""
        if self.measurement is None:
            return 0
        return max(0, self.measurement.conv_flops - sum(r.flops_dense or 0 for r in self.rows if r.kind != "linear"))

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The factors that the schedule comes to within :attr:`cycle`, in their order of size.

        Where they are more than 128, as those of a long cosine in eager mode, they are rounded to 128ths.
        """
        factors = Counter(map(self.factor_at, self.cycle))
        if len(factors) > _PHASES:
            rounded: Counter[float] = Counter()
            for factor, steps in factors.items():
                rounded[round(factor * _PHASES) / _PHASES] += steps
            factors = rounded
        found = []
        for factor, steps in sorted(factors.items()):
            there = self._with(factor)
            found.append(Phase(factor, steps / len(self.cycle), there.flops_now, there._grad_bytes("now")))
        return tuple(found)

    @property
    def conv_flops(self) -> dict[str, float] | None:
        """FLOPs of a step's convolution backward passes: ``dense``, ``now`` and ``mean``; None before shapes are known."""
        dense = self.flops_dense
        return {"dense": dense, "now": self.flops_now, "mean": self.flops_mean} if dense else None

    @property
    def backward_flops(self) -> dict[str, float] | None:
        """FLOPs of a step's whole backward pass: ``dense``, ``now`` and ``mean``; None without a measurement."""
        return self._with_rest(self.measurement.backward_flops if self.measurement else 0)

    @property
    def step_flops(self) -> dict[str, float] | None:
        """FLOPs of a whole step, forward and backward: ``dense``, ``now`` and ``mean``; None without a measurement."""
        return self._with_rest(self.measurement.step_flops if self.measurement else 0)

    def _with_rest(self, everything: int) -> dict[str, float] | None:
        conv = self.conv_flops
        return {k: everything - conv["dense"] + v for k, v in conv.items()} if everything and conv else None

    @property
    def grad_bytes(self) -> dict[str, float] | None:
        """Memory of the outputs' gradients that a step's convolution backward passes read, in bytes.

        ``dense``, ``now`` and ``mean``; the dropped channels of a gradient are given back as soon as the kept ones have
        been picked. None before shapes are known.
        """
        dense = self._grad_bytes("dense")
        mean = sum(p.share * p.grad_bytes for p in self.phases) if dense else 0
        return {"dense": dense, "now": self._grad_bytes("now"), "mean": mean} if dense else None

    def _grad_bytes(self, when: str) -> int:
        return sum(getattr(r, f"grad_bytes_{when}") or 0 for r in self.rows)

    @property
    def cycle(self) -> range:
        """The steps that a mean is taken over: all, if the schedule's ``total`` is known; else one period after warm-up."""
        schedule = self.policy.schedule
        if schedule.total is not None:
            start, span = 0, schedule.total
        else:
            period = 1 if schedule.kind == "constant" else schedule.period
            start, span = schedule.warmup, lcm(period, 2) if schedule.interleave else period
        # of very many steps some, apart by a number that has no part in common with the period
        apart = -(-span // (1 << 20))
        while gcd(apart, 2 * schedule.period) > 1:
            apart += 1
        return range(start, start + span, apart)

    def factor_at(self, step: int) -> float:
        """The schedule's factor at a step, as the front end uses it (rounded to ``levels`` where compiled)."""
        schedule = self.policy.schedule
        return schedule.quantized_factor(step) if self.quantized else schedule.factor(step)

    def at(self, step: int) -> Report:
        """The report of another step of the schedule, counted from 0.

        Raises:
            ValueError: ``step`` is negative, or no whole number.
        """
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step {step!r}: steps are whole numbers and count from 0")
        return replace(self._with(self.factor_at(step)), step=step)

    def at_factor(self, factor: float) -> Report:
        """The report of a factor, 0 ≤ factor ≤ 1, whatever the step; its ``step`` stays.

        Raises:
            ValueError: ``factor`` is not between 0 and 1.
        """
        if not 0 <= factor <= 1:
            raise ValueError(f"factor {factor!r}: factors are between 0 and 1")
        return self._with(factor)

    def kept_at(self, factor: float) -> Mapping[str, Sequence[int]]:
        """Layer → channels that each of its calls keeps at a factor, for the layers whose shapes are known."""
        return self._plan(factor)

    def _with(self, factor: float) -> Report:
        kept = self.kept_at(factor)
        losses = self._plan.losses(factor)
        rows = []
        for row in self.rows:
            counts, calls = kept.get(row.layer), self.calls.get(row.layer)
            reason = "" if of_a_step(row.reason) else row.reason
            if row.layer in losses:
                reason = f"{LOSES}{losses[row.layer]}"
            if counts and calls:
                used = None if is_masked(row.criterion) else counts
                keeps_all = all(k == c.channels for k, c in zip(counts, calls, strict=True))
                row = replace(
                    row,
                    kept=counts[0],
                    flops_now=total_flops(calls, used, row.gradients),
                    grad_bytes_now=total_bytes(calls, used, row.gradients),
                    reason=reason or (DENSE_STEP if factor == 0 else KEEPS_ALL if keeps_all else ""),
                )
            elif row.rewritten:
                row = replace(row, reason=reason or (DENSE_STEP if factor == 0 else ""))
            rows.append(row)
        return replace(self, factor=factor, rows=tuple(rows))

    def __getitem__(self, layer: str) -> Row:
        for row in self.rows:
            if row.layer == layer:
                return row
        near = nearest(layer, [row.layer for row in self.rows])
        raise KeyError(f"{layer}; nearest: {near}" if near else layer)

    # --- graphs

    @cached_property
    def captures(self) -> list[Capture]:
        """The captured graphs with what is known of their nodes."""
        return self._captures()

    @property
    def graphs(self) -> dict[str, GraphModule]:
        """The captured graphs by name and stage, ``layer1/traced``, ``graph 0/rewritten``, ``graph 0/backward, factor 1``."""
        return {f"{c.title}/{stage}": graph for c in self.captures for stage, graph in c.stages.items()}

    def graph(self, name: str) -> GraphModule:
        """One of :attr:`graphs`.

        Raises:
            SSPropError: there is no such graph; names those that there are.
        """
        graphs = self.graphs
        if name not in graphs:
            raise SSPropError(f"the report has no graph {name!r}; it has {', '.join(map(repr, graphs)) or 'none'}")
        return graphs[name]

    def diff(self, before: str, after: str) -> str:
        """Unified diff of the code generated from two of :attr:`graphs`, from ``before`` to ``after``; empty if they are equal.

        Raises:
            SSPropError: there is no such graph.
        """
        old, new = (self.graph(name).code.strip().splitlines() for name in (before, after))
        return "\n".join(difflib.unified_diff(old, new, before, after, lineterm=""))

    def print_readable(self, name: str | None = None) -> None:
        """Print one of :attr:`graphs` as code with types and layers, or, without a name, each of them.

        Raises:
            SSPropError: there is no such graph.
        """
        for title, graph in self.graphs.items() if name is None else [(name, self.graph(name))]:
            print(f"# {title}")
            graph.print_readable()

    def to_networkx(self, capture: str | None = None, parameters: bool = False) -> networkx.DiGraph:
        """The dataflow, as captured before the passes: nodes are operations, edges are what data follow.

        Every node has the attributes ``op`` (of ``torch.fx``), ``target`` (what is called), ``module`` (whose forward
        calls it), ``shape`` (of its output, or None) and ``layer`` (or None). A convolution has those of :class:`Row`, too:
        ``kind``, ``rung``, ``rule``, ``drop_rate``, ``kept``, ``total``, ``flops_dense``, ``flops_now`` and so on.
        Nodes are named as in the graph; where there are several graphs, ``graph 0/conv2d``. Layers that are in no graph
        are nodes without edges.

        Args:
            capture: the graph's name without stage, ``model`` or ``graph 0``; all without it.
            parameters: whether parameters and buffers are nodes.

        Raises:
            SSPropError: there is no such graph.
        """
        chosen = [c for c in self.captures if capture in (None, c.title)]
        if capture is not None and not chosen:
            known = ", ".join(repr(c.title) for c in self.captures)
            raise SSPropError(f"the report has no graph {capture!r}; it has {known or 'none'}")
        rows = {row.layer: asdict(row) for row in self.rows}
        return to_networkx({c.title: operations(c, parameters) for c in chosen}, rows, rest=capture is None)

    # --- forms

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for JSON."""
        return {
            "model": self.model,
            "front_end": self.front_end,
            "policy": self.policy.to_dict(),
            "step": self.step,
            "factor": self.factor,
            "coverage": self.coverage,
            "flops_dense": self.flops_dense,
            "flops_now": self.flops_now,
            "flops_mean": self.flops_mean,
            "mean_over_steps": [self.cycle.start, self.cycle.stop],
            "backward_flops": self.backward_flops,
            "step_flops": self.step_flops,
            "grad_bytes": self.grad_bytes,
            "phases": [asdict(phase) for phase in self.phases],
            "unmatched": list(self.unmatched),
            "rows": [{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(row).items()} for row in self.rows],
            "measurement": self.measurement.to_dict() if self.measurement else None,
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """The summary and the table, for a pull request or a log book."""
        return "\n".join([f"- {text}" for text in self.summary().splitlines()] + ["", *markdown_table(self.rows)]) + "\n"

    def to_pandas(self) -> Any:
        """The rows as a ``pandas.DataFrame``, indexed by layer.

        Raises:
            SSPropError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise SSPropError("report.to_pandas() needs pandas: pip install pandas; report.to_dict() does without") from None
        names = list(Row.__dataclass_fields__)
        return pandas.DataFrame([asdict(row) for row in self.rows], columns=names).set_index("layer")

    def to_html(self, path: str | Path | None = None) -> str:
        """The page: the dataflow, code before and after, and the schedule, in one file that needs no network.

        Args:
            path: written there, too, in UTF-8.

        Returns:
            The page's text.
        """
        from .page import render

        text = render(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        return "\n".join([self.summary(), "", *text_table(self.rows)])

    __repr__ = __str__

    def summary(self) -> str:
        """Two to six lines: coverage, step, FLOPs, memory; and one for each rule of no effect."""
        return summarized(self)


__all__ = ["Phase", "Plan", "Report", "Row"]
