"""The table of docs/performance.md, in Markdown, from the JSON files that benchmarks/step.py wrote.

python benchmarks/table.py benchmarks/results/avx2/*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLUMNS = ("model", "arm", "compared with", "step, ms", "ratio (quartiles)", "ceiling", "captured", "peak memory", "command")


def rows(result: dict):
    s = result["setting"]
    layout = "contiguous" if s["contiguous"] else "channels-last"
    command = f"--model {s['model']} --arms {s['arms']} --rounds {s['rounds']}"
    command += " --contiguous" * s["contiguous"] + " --memory" * s["memory"]
    command += f" --profitable {s['profitable']}" if s["profitable"] != "always" else ""
    for name, arm in result["arms"].items():
        base = result["arms"][arm["base"]]
        if name == arm["base"]:
            continue
        ratio = arm["ratio"]
        peak = f"{arm['peak_bytes'] / base['peak_bytes']:.2f}" if arm["peak_bytes"] else ""
        yield (
            f"{s['model']}, {layout}" + (", `profitable: auto`" if s["profitable"] == "auto" else ""),
            name,
            arm["base"],
            f"{1e3 * arm['step']:.0f} / {1e3 * base['step']:.0f}",
            f"{ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})",
            f"{arm['ceiling']:.3f}" if arm["ceiling"] is not None else "",
            f"{arm['captured']:.2f}" if arm["captured"] is not None else "",
            peak,
            f"`{command}`",
        )


def main(paths: list[str]) -> None:
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for path in paths:
        for row in rows(json.loads(Path(path).read_text())):
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
