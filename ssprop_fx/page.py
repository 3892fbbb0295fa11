"""The page of a report: one HTML file with the dataflow, code before and after, and a slider over the schedule."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from .cost import Call
from .dataflow import Operation, operations
from .masking import is_masked
from .report import of_a_step
from .summary import rewritten

if TYPE_CHECKING:
    from .report import Report, Row

_BY = {"transform": " by transform", "backend": " by the compiler backend", "policy": " under the policy"}  # the front ends
_STEPS = 200  # positions of the slider
_FACTORS = 48  # distinct factors among them
_HORIZON = 1 << 16  # steps that are looked at to find them


def render(report: Report) -> str:
    """The page's text: HTML, style, script and data in one."""
    assets = files("ssprop_fx") / "assets"
    text = (assets / "page.html").read_text(encoding="utf-8")
    # `</script>` or `<!--` inside a string would end the element that holds the data
    data = json.dumps(page_data(report), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "title": _escaped(f"{report.model} · ssprop-fx"),
        "style": (assets / "page.css").read_text(encoding="utf-8"),
        "script": (assets / "page.js").read_text(encoding="utf-8"),
        "data": data,
    }
    for name, part in parts.items():
        text = text.replace(f"/*{name}*/", part)
    return text


def page_data(report: Report) -> dict[str, Any]:
    """What the page shows, as plain values.

    ``units`` are the calls of the layers, in the rows' order; ``phases`` give what each unit keeps, and its FLOPs, at each
    factor; ``steps`` are the slider's positions, [first step, last step, phase]; ``sections`` are the graphs, whose nodes
    name their inputs and units by index.
    """
    units, first = _units(report)
    steps = _steps(report)
    factors = list(dict.fromkeys(factor for _, _, factor in steps))
    captured = [(c, operations(c)) for c in report.captures if c.current]
    drawn = {o.layer for _, found in captured for o in found}
    counts = Counter(o.layer for _, found in captured for o in found)
    sections = [_section(c.title, found, report, first, counts) for c, found in captured]
    rest = [row for row in report.rows if row.layer not in drawn]
    if rest:
        title = "Layers outside the graphs, in the model’s order" if sections else "Layers, in the model’s order"
        sections.append(_rows_section(title, rest, report, first))
    return {
        "model": report.model,
        "rewritten": rewritten(report, _BY[report.front_end]),
        "summary": report.summary().splitlines(),
        "digest": report.policy.digest,
        "policy": report.policy.to_dict(),
        "step": report.step,
        "mean": report.flops_mean if report.flops_dense else None,
        "cycle": [report.cycle.start, report.cycle.stop],
        "stepFlops": report.measurement.step_flops if report.measurement else None,
        "layers": [_layer(row) for row in report.rows],
        "units": units,
        "phases": [_phase(report, factor, units) for factor in factors],
        "steps": [[start, stop, factors.index(factor)] for start, stop, factor in steps],
        "sections": sections,
    }


def _units(report: Report) -> tuple[list[list[int]], dict[str, int]]:
    """[layer, dense FLOPs, channels, bytes of the output's gradient] of every call, and where those of a layer begin."""
    units: list[list[int]] = []
    first: dict[str, int] = {}
    for i, row in enumerate(report.rows):
        calls = report.calls.get(row.layer)
        if calls:
            first[row.layer] = len(units)
            units += [[i, call.flops(), call.channels, call.grad_bytes()] for call in calls]
    return units, first


def _phase(report: Report, factor: float, units: Sequence[Sequence[int]]) -> dict[str, Any]:
    kept = report.kept_at(factor)
    counts: list[int] = []
    flops: list[int] = []
    memory: list[int] = []
    for row in report.rows:
        calls: Sequence[Call] = report.calls.get(row.layer, ())
        keep = kept.get(row.layer, [c.channels for c in calls])
        counts += keep
        masked = is_masked(row.criterion)
        for call, k in zip(calls, keep, strict=True):
            used = None if masked else k
            flops.append(call.flops(used, row.gradients))
            memory.append(call.grad_bytes(used, row.gradients))
    assert len(counts) == len(units)
    return {"factor": factor, "kept": counts, "flops": flops, "memory": memory}


def _steps(report: Report) -> list[tuple[int, int, float]]:
    """(first, last, factor) of runs of equal factor, thinned out in pairs where they are too many."""
    schedule, cycle = report.policy.schedule, report.cycle
    stop = cycle.stop if schedule.total else cycle.start + len(cycle) * -(-12 // len(cycle))
    runs: list[tuple[int, int, float]] = []
    for step in range(min(stop, _HORIZON)):
        factor = report.factor_at(step)
        if runs and runs[-1][2] == factor and step != report.step and runs[-1][0] != report.step and stop > _STEPS:
            runs[-1] = (runs[-1][0], step, factor)
        else:
            runs.append((step, step, factor))
    if len({f for _, _, f in runs}) > _FACTORS:
        runs = _thinned(runs, _FACTORS, report.step)
    runs = _thinned(runs, _STEPS, report.step)
    if not any(a <= report.step <= b for a, b, _ in runs):
        runs.append((report.step, report.step, report.factor_at(report.step)))
    return sorted(runs)


def _thinned(runs: list[tuple[int, int, float]], most: int, step: int) -> list[tuple[int, int, float]]:
    if len(runs) <= most:
        return runs
    # neighbours stay together, so that dense and sparse turns both remain
    starts = [i * (len(runs) - 2) // (most // 2 - 1) for i in range(most // 2)]
    chosen = set(itertools.chain.from_iterable((i, i + 1) for i in starts))
    return [run for i, run in enumerate(runs) if i in chosen or run[0] <= step <= run[1]]


def _layer(row: Row) -> dict[str, Any]:
    return {
        "name": row.layer,
        "kind": row.kind,
        "kinds": row.kinds,
        "rung": row.rung,
        "rule": row.rule,
        "rate": row.drop_rate,
        "criterion": row.criterion,
        "gradients": row.gradients,
        "input": row.input_shape,
        "weight": row.weight_shape,
        "output": row.output_shape,
        "calls": row.calls,
        "reason": "" if of_a_step(row.reason) else row.reason,  # the page knows the step
        "rewritten": row.rewritten,
    }


def _section(
    title: str, found: Sequence[Operation], report: Report, first: dict[str, int], counts: Counter[str | None]
) -> dict[str, Any]:
    index = {row.layer: i for i, row in enumerate(report.rows)}
    at = {o.name: i for i, o in enumerate(found)}
    nodes = []
    for o in found:
        node: dict[str, Any] = {
            "name": o.name,
            "op": o.op,
            "target": o.target,
            "module": o.module,
            "inputs": [at[i] for i in o.inputs],
            "code": o.code,
        }
        if o.shape is not None:
            node["shape"] = o.shape
        if o.layer in index:
            units = _units_of(o.layer, o.nth, counts[o.layer], report, first)
            node |= {"layer": index[o.layer], "units": units}
        if o.rewritten:
            node |= {"after": o.rewritten, "lowered": list(o.lowered.items())}
        nodes.append(node)
    return {"title": title, "graph": True, "nodes": nodes}


def _units_of(layer: str, nth: int, drawn: int, report: Report, first: dict[str, int]) -> list[int]:
    """The calls that the ``nth`` of a layer's ``drawn`` nodes stands for; the last node stands for those that are left."""
    calls = len(report.calls.get(layer, ()))
    stop = calls if nth == drawn - 1 else min(nth + 1, calls)
    return [first[layer] + i for i in range(min(nth, calls), stop)] if calls else []


def _rows_section(title: str, rows: Sequence[Row], report: Report, first: dict[str, int]) -> dict[str, Any]:
    """Layers that no graph shows: in order, without edges."""
    index = {row.layer: i for i, row in enumerate(report.rows)}
    nodes = []
    for row in rows:
        calls = report.calls.get(row.layer, ())
        function = f"torch.nn.functional.{row.kind}" if row.kind != "?" else "?"
        geometry = _geometry(calls[0]) if calls else "…"
        settings = f"{row.layer!r}, {row.drop_rate:g}, {row.criterion!r}, …, {row.gradients!r}, …"
        node: dict[str, Any] = {
            "name": row.layer,
            "op": "layer",
            "target": row.kind,
            "module": row.layer.replace("#", ".#"),
            "inputs": [],
            "code": f"{function}(input, weight, bias, {geometry})",
            "layer": index[row.layer],
            "units": [first[row.layer] + i for i in range(len(calls))] if calls else [],
        }
        if row.output_shape is not None:
            node["shape"] = row.output_shape
        if row.rewritten and row.drop_rate:
            node |= {"after": f"ssprop.conv(input, weight, bias, {geometry}, {settings})", "lowered": []}
        nodes.append(node)
    return {"title": title, "graph": False, "nodes": nodes}


def _geometry(call: Call) -> str:
    a = call.args
    names = ("stride", "padding", "dilation", "output_padding") if a.transposed else ("stride", "padding", "dilation")
    return ", ".join([f"{name}={tuple(getattr(a, name))}" for name in names if getattr(a, name)] + [f"groups={a.groups}"])


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


__all__ = ["page_data", "render"]
