"""What a report is made of: a row per convolution, a phase per factor, and the tables of rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

DENSE_STEP, KEEPS_ALL, LOSES = "factor 0 at this step", "rounded up to all channels", "does not pay: "


def of_a_step(reason: str) -> bool:
    """Whether a row's reason is about the report's step, and others may differ."""
    return reason in (DENSE_STEP, KEEPS_ALL) or reason.startswith(LOSES)


@dataclass(frozen=True)
class Row:
    """One convolution of a model.

    Attributes:
        layer: name as in ``named_modules()``; ``owner#conv2d.0`` for a functional call.
        kind: the convolution function.
        kinds: everything a policy rule's ``kind`` can match.
        rung: ``graph``, ``module`` or ``call`` (how it was rewritten), or ``-`` where it was not.
        rule: the rule of the policy that decided, with its line where the policy came from a file.
        drop_rate: the rule's drop rate; times the schedule's factor it is the rate in force.
        criterion, round_to, gradients: as the rule has them; the criterion is ``l1 over space``, say, where the rule's
            ``drop_over`` is not ``channels``.
        kept, total: channels that the backward pass of the report's step uses, of how many; whole groups for a depthwise
            convolution. Of the first call. None before shapes are known.
        input_shape, weight_shape, output_shape: of the first call, (N, C, *spatial), as the function takes the weight,
            (N, K, *spatial); None before the first step.
        calls: calls in a step, as a captured graph, a measurement or else the first training step tells; 1 before that.
        flops_dense, flops_now: of the backward pass of all calls (the gradients of input and weight, where they are
            computed), a multiply-add counted as two.
        grad_bytes_dense, grad_bytes_now: memory of the outputs' gradients that the backward products of all calls read.
        reason: why it is dense, where it is; empty for one that is sparse at the report's step.
    """

    layer: str
    kind: str
    kinds: tuple[str, ...]
    rung: str
    rule: str
    drop_rate: float
    criterion: str
    round_to: int | str
    gradients: str
    kept: int | None
    total: int | None
    input_shape: tuple[int, ...] | None
    weight_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    calls: int
    flops_dense: int | None
    flops_now: int | None
    grad_bytes_dense: int | None
    grad_bytes_now: int | None
    reason: str

    @property
    def rewritten(self) -> bool:
        """Whether its backward pass follows the policy (which may say dense at this step)."""
        return self.rung != "-"


@dataclass(frozen=True)
class Phase:
    """What the steps of one factor of the schedule cost.

    Attributes:
        factor: what every drop rate is multiplied by.
        share: of the steps of :attr:`Report.cycle` that have it.
        flops: of the convolutions' backward passes, a step.
        grad_bytes: memory of the outputs' gradients that those read, a step.
    """

    factor: float
    share: float
    flops: int
    grad_bytes: int


class Plan(Protocol):
    """What a policy makes of a model's layers at a factor."""

    def __call__(self, factor: float) -> Mapping[str, Sequence[int]]:
        """Layer → channels that each of its calls keeps."""
        ...

    def losses(self, factor: float) -> Mapping[str, str]:
        """Layer → measured times, of those that stay dense because dropping does not pay."""
        ...


HEADER = ("layer", "kind", "rung", "rate", "kept", "output", "backward MFLOP", "now", "rule", "reason")
NUMBERS = frozenset(("rate", "kept", "backward MFLOP", "now"))


def cells(row: Row) -> tuple[str, ...]:
    """A row's line in a table, one text for each of ``HEADER``."""
    return (
        _printable(row.layer),
        row.kind,
        row.rung,
        f"{row.drop_rate:g}",
        "?" if row.kept is None else f"{row.kept}/{row.total}",
        "?" if row.output_shape is None else "×".join(map(str, row.output_shape)),
        "?" if row.flops_dense is None else f"{row.flops_dense / 1e6:.1f}",
        "?" if row.flops_now is None else f"{row.flops_now / 1e6:.1f}",
        _printable(row.rule),
        row.reason,
    )


def _printable(name: str) -> str:
    """A name on one line: any text may be the key of a ``ModuleDict``."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def text_table(rows: Iterable[Row]) -> list[str]:
    """The lines of a table for a terminal."""
    table = [HEADER, *map(cells, rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEADER))]
    lines = [
        "  ".join(
            c.rjust(w) if name in NUMBERS else c.ljust(w) for name, c, w in zip(HEADER, line, widths, strict=True)
        ).rstrip()
        for line in table
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return lines


def markdown_table(rows: Iterable[Row]) -> list[str]:
    """The lines of a table in Markdown."""
    line = "| {} |".format
    table = [line(" | ".join(map(_escaped, row))) for row in (HEADER, *map(cells, rows))]
    table.insert(1, line(" | ".join("---:" if c in NUMBERS else "---" for c in HEADER)))
    return table


def _escaped(cell: str) -> str:
    """A cell that Markdown shows as it is."""
    return re.sub(r"([\\`*|])", r"\\\1", cell).replace("<", "&lt;")
