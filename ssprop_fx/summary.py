"""A report in a few lines: what was rewritten, and what a step costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import Report

_UNKNOWN = (
    "not known until the layers have run in a training step (never in code that another backend compiled); "
    "give example inputs (`--input` in the command) to know them now"
)


def summarized(report: Report) -> str:
    """Two to six lines: coverage, step, FLOPs, memory; and one for each rule of no effect."""
    by = {"transform": "through transform", "backend": "through the backend", "policy": "under the policy"}[report.front_end]
    lines = [f"{report.model} {by}: {rewritten(report)}; step {report.step}, factor {report.factor:g}"]
    lines += [f"without effect so far: {problem}" for problem in report.unmatched]
    if report.measurement is not None:
        lines.append(str(report.measurement))
    if report.conv_flops is None:
        why = _UNKNOWN
        if report.measurement is not None:
            why = "the measured step has no convolution's backward pass"
        return "\n".join([*lines, f"FLOPs: {why}"])
    kinds = "convolution and linear" if _has_linear(report) else "convolution"
    lines.append(f"backward {kinds} FLOPs of a step: {_saved(report.conv_flops)}")
    unknown = sum(row.rewritten and row.flops_dense is None for row in report.rows)
    if unknown and report.measurement is None:
        lines.append(f"{unknown} of the rewritten layers not counted, their FLOPs: {_UNKNOWN}")
    if report.backward_flops and report.step_flops:
        lines.append(f"backward FLOPs of a step: {_saved(report.backward_flops)}")
        lines.append(f"all FLOPs of a step: {_saved(report.step_flops)}")
    if report.grad_bytes:
        mebibytes = {when: value / 2**20 for when, value in report.grad_bytes.items()}
        lines.append(f"memory of output gradients read: {_saved(mebibytes, ' MiB')}")
    return "\n".join(lines)


def rewritten(report: Report, by: str = "") -> str:
    """``52 of 53 convolutions rewritten, 1 dense by rule``: what the terminal and the page say.

    Args:
        by: what stands after "rewritten".
    """
    what, many = "layer" if _has_linear(report) else "convolution", len(report.rows)
    sparse = sum(row.rewritten and row.drop_rate > 0 for row in report.rows)
    left = sum(not row.rewritten for row in report.rows)
    would = " would be" if report.front_end == "policy" else ""
    parts = [f"{sparse} of {many} {what}{'' if many == 1 else 's'}{would} rewritten{by}"]
    parts += [f"{many - sparse - left} dense by rule"] if many > sparse + left else []
    parts += [f"{left} not reached"] if left else []
    return ", ".join(parts)


def _has_linear(report: Report) -> bool:
    return any(row.kind == "linear" for row in report.rows)


def _saved(flops: Mapping[str, float], unit: str = "") -> str:
    dense, now, mean = flops["dense"], flops["now"], flops["mean"]
    saved = f"{1 - now / dense:.1%} saved at this step, {1 - mean / dense:.1%} over the schedule"
    return f"{now:.4g} of {dense:.4g}{unit}, {saved}"
