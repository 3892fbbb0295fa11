"""Rich tables of the command line: a report, and a comparison of two trainings."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .demo import Result
from .report import Report
from .rows import HEADER, NUMBERS, cells


def report_table(report: Report) -> Table:
    """One row per convolution; those that stay dense are dim."""
    table = Table(box=box.SIMPLE_HEAD, title=Text(report.summary()), title_justify="left", title_style="")
    for name in HEADER:
        table.add_column(name, justify="right" if name in NUMBERS else "left", overflow="fold")
    for row in report.rows:
        table.add_row(*map(Text, cells(row)), style="dim" if row.reason else "")
    return table


def comparison(result: Result) -> Table:
    """Dense and policy side by side: accuracy, FLOPs, time."""
    dense, sparse, setting = result.dense, result.sparse, result.setting
    how = "torch.compile" if setting["compiled"] else "eager"
    title = (
        f"ResNet of {setting['parameters'] / 1e6:.1f} M parameters, {setting['steps']} steps of {setting['batch']} digits, "
        f"seed {setting['seed']}\nPyTorch {setting['torch']}, {how}, threads: {setting['threads']}"
    )
    table = Table("", title=title, title_style="", title_justify="left")
    for name in ("dense", "policy", "difference"):
        table.add_column(name, justify="right")
    points = 100 * (sparse.accuracy - dense.accuracy)
    rows: list[tuple[Any, ...]] = [
        (
            f"test accuracy ({setting['test_images']} images)",
            f"{dense.accuracy:.2%}",
            f"{sparse.accuracy:.2%}",
            f"{points:+.2f} points",
        ),
        (
            "backward convolution FLOPs",
            f"{dense.conv_flops:.3g}",
            f"{sparse.conv_flops:.3g}",
            _less(result.conv_flops_saved),
        ),
        ("all FLOPs", f"{dense.step_flops:.3g}", f"{sparse.step_flops:.3g}", _less(result.step_flops_saved)),
        ("mean step time", f"{dense.mean_ms:.1f} ms", f"{sparse.mean_ms:.1f} ms", _less(result.time_saved)),
    ]
    if len(sparse.step_ms) <= 4:
        for factor, ms in sorted(sparse.step_ms.items()):
            name = "dense" if factor == 0 else "sparse" if factor == 1 else f"factor {factor:g}"
            rows.append((f"  median, {name} steps", f"{dense.mean_ms:.1f} ms", f"{ms:.1f} ms", _less(1 - ms / dense.mean_ms)))
    for row in rows:
        table.add_row(*row)
    return table


def _less(share: float) -> str:
    return f"{abs(share):.1%} {'less' if share >= 0 else 'more'}"
