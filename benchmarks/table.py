"""The table of docs/performance.md, in Markdown, from the JSON files that benchmarks/step.py wrote.

python benchmarks/table.py benchmarks/results/avx2/*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLUMNS = (
    "model", "arm", "compared with", "step, ms", "ratio (quartiles)", "ceiling", "captured", "peak memory",
    "joules a step", "energy ratio (quartiles)", "command",
)  # fmt: skip
OPTIONAL = COLUMNS[8:10]  # left out where no result has them


def rows(result: dict):
    s = result["setting"]
    layout = "contiguous" if s["contiguous"] else "channels-last"
    command = f"--model {s['model']} --arms {s['arms']} --rounds {s['rounds']}"
    command += " --contiguous" * s["contiguous"] + " --memory" * s["memory"]
    command += f" --profitable {s['profitable']}" if s["profitable"] != "always" else ""
    for name in ("batch", "size", "amp"):
        command += f" --{name} {s[name]}" if s.get(name) else ""
    command += f" --device {s['device']}" if s["device"] != "cpu" else ""
    command += " --energy" * s.get("energy", False) + " --cudnn-benchmark" * s.get("cudnn_benchmark", False)
    for name, arm in result["arms"].items():
        base = result["arms"][arm["base"]]
        if name == arm["base"]:
            continue
        ratio = arm["ratio"]
        peak = f"{arm['peak_bytes'] / base['peak_bytes']:.2f}" if arm["peak_bytes"] else ""
        joules = arm.get("joules")
        yield (
            f"{s['model']}, {layout}" + (", `profitable: auto`" if s["profitable"] == "auto" else ""),
            name,
            arm["base"],
            f"{1e3 * arm['step']:.0f} / {1e3 * base['step']:.0f}",
            spread(ratio),
            f"{arm['ceiling']:.3f}" if arm["ceiling"] is not None else "",
            f"{arm['captured']:.2f}" if arm["captured"] is not None else "",
            peak,
            f"{joules['median']:.4g} / {base['joules']['median']:.4g}" if joules else "",
            spread(arm["joules_ratio"]) if joules else "",
            f"`{command}`",
        )


def spread(values: dict) -> str:
    return f"{values['median']:.3f} ({values['low']:.3f}–{values['high']:.3f})"


def main(paths: list[str]) -> None:
    table = [row for path in paths for row in rows(json.loads(Path(path).read_text()))]
    used = [i for i, name in enumerate(COLUMNS) if name not in OPTIONAL or any(row[i] for row in table)]
    print("| " + " | ".join(COLUMNS[i] for i in used) + " |")
    print("|" + "---|" * len(used))
    for row in table:
        print("| " + " | ".join(row[i] for i in used) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
