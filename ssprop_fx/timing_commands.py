"""The commands that measure times on the user's machine: ``ssprop-fx tune`` and ``ssprop-fx bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .arms import ARMS, check_arms
from .bench import bench as run_bench
from .bench import check_plot
from .commands import JsonOption, PolicyOption, app, read_policy, running
from .errors import SSPropError
from .files import check_writable
from .models import FORMS, MADE, NameProblem, first_line, load_model, make_input
from .tuning import RATES, Tuned
from .tuning import tune as run_tune

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=FORMS + ".")]
ShapesOption = Annotated[
    list[str],
    typer.Option(
        "--input", "-i", metavar="SHAPE", help="Shape of an input, as 16x3x224x224, which is " + MADE + "; repeat it for more."
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="Where to run, such as cuda:1. Default: cuda where there is one, else cpu.")
]
AmpOption = Annotated[str | None, typer.Option("--amp", metavar="TYPE", help="Autocast type: bfloat16 or float16.")]
ContiguousOption = Annotated[bool, typer.Option("--contiguous", help="Memory order NCHW instead of channels-last.")]


@app.command(
    epilog="Examples:\n\n  ssprop-fx tune torchvision:mobilenet_v2 --input 16x3x128x128 -o policy.yaml\n\n"
    "  ssprop-fx tune net.py:build -p policy.yaml -i 32x1x28x28 -o tuned.yaml\n\n"
    "  ssprop-fx tune timm:resnet50 -i 64x3x224x224 --device cuda --amp bfloat16 --json | jq .seconds"
)
def tune(
    model: ModelArgument,
    shapes: ShapesOption,
    policy: PolicyOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the policy there, not to the screen.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    rates: Annotated[
        list[float] | None,
        typer.Option("--rate", min=0.01, max=0.99, help="To try besides the policy's, instead of 0.5, 0.8, 0.9; repeat it."),
    ] = None,
    device: DeviceOption = None,
    contiguous: ContiguousOption = False,
    amp: AmpOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time every distinct convolution of a model, and write a policy that leaves dense what does not pay.

    Give the batch and image size that you train with. What was timed before, on this machine, is not timed again.
    """
    dtype = _autocast_type(amp)
    chosen = read_policy(policy)
    if output is not None and output.exists() and not force:
        raise SSPropError(f"{output} exists and is left as it is; choose another name, or --force")
    if output is not None:
        check_writable(output)
    built, inputs = _on_device(model, shapes, device, contiguous)
    console = Console(stderr=True)
    columns = (TextColumn("timing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text)

        tuned = running(model, shapes, lambda: run_tune(built, inputs, chosen, rates or RATES, progress, dtype))
    if output is not None:
        try:
            output.write_text(tuned.to_yaml(), encoding="utf-8")
        except OSError as problem:
            raise SSPropError(f"{output} cannot be written: {problem.strerror}") from None
    if as_json:
        print(json.dumps(tuned.to_dict(), indent=2))
        return
    dense, given, left = (1e3 * t for t in tuned.seconds)
    Console(stderr=output is None).print(_table(tuned))
    said = f"backward passes of its convolutions: {dense:.1f} ms dense, {given:.1f} ms sparse, {left:.1f} ms tuned"
    if output is None:
        print(tuned.to_yaml(), end="")
    else:
        print(f"{said}\nwrote {output}")


@app.command(
    epilog="Examples:\n\n  ssprop-fx bench torchvision:resnet18 --input 16x3x128x128\n\n"
    "  ssprop-fx bench net.py:build -p policy.yaml -i 32x1x28x28 --arm eager --arm transform --memory\n\n"
    "  ssprop-fx bench timm:resnet50 -i 256x3x224x224 --device cuda --amp bfloat16 --memory --energy"
)
def bench(
    model: ModelArgument,
    shapes: ShapesOption,
    policy: PolicyOption = None,
    arms: Annotated[
        list[str] | None,
        typer.Option("--arm", metavar="ARM", help="; ".join(f"{k}: {a.text}" for k, a in ARMS.items()) + ". Repeat it."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each arm; they take turns.")] = 21,
    device: DeviceOption = None,
    contiguous: ContiguousOption = False,
    amp: AmpOption = None,
    memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory, too.")] = False,
    energy: Annotated[
        bool, typer.Option("--energy", help="Measure joules, too (NVML, RAPL); on CUDA half a minute an arm.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the times there (PNG; needs matplotlib).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time training steps of a model, dense and under a policy, and say how much of what is possible is gained.

    A step is forward, loss (mean square of the outputs) and backward, with the policy's full drop rates.
    """
    dtype = _autocast_type(amp)
    wanted = arms or ["dense", "ssprop", "dense-phase"]
    try:
        check_arms(wanted)
    except SSPropError as problem:
        raise typer.BadParameter(str(problem)) from None
    if plot is not None:
        check_plot(plot)
    chosen = read_policy(policy)
    built, inputs = _on_device(model, shapes, device, contiguous)
    console = Console(stderr=True)
    with console.status("starting") as status:

        def progress(line: str) -> None:
            status.update(line)

        result = running(
            model, shapes,
            lambda: run_bench(
                built, inputs, chosen, wanted, rounds, memory=memory, amp=dtype, progress=progress, energy=energy
            ),
        )  # fmt: skip
    print(json.dumps(result.to_dict(), indent=2) if as_json else result)
    if plot is not None:
        try:
            result.plot(plot)
        except (OSError, ValueError, ImportError) as problem:  # no such folder, no such format, no matplotlib
            raise SSPropError(f"{plot} cannot be drawn: {first_line(problem)}") from None


def _autocast_type(name: str | None) -> torch.dtype | None:
    if name not in (None, "bfloat16", "float16"):
        raise typer.BadParameter(f"{name!r} is no autocast type; expected bfloat16 or float16")
    return getattr(torch, name) if name else None


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _on_device(name: str, shapes: list[str], device: str | None, contiguous: bool) -> tuple[Any, tuple]:
    device = device or _default_device()
    try:
        inputs, model = [make_input(shape).to(device) for shape in shapes], load_model(name).to(device)
    except NameProblem as problem:
        raise typer.BadParameter(str(problem)) from None
    except (RuntimeError, AssertionError) as problem:  # no such device
        raise typer.BadParameter(first_line(problem)) from None
    formats = {} if contiguous else {4: torch.channels_last, 5: torch.channels_last_3d}
    used = {x.dim() for x in inputs} & formats.keys()
    for dims in used:
        model = model.to(memory_format=formats[dims])
    return model, tuple(x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format)) for x in inputs)


def _table(tuned: Tuned) -> Table:
    table = Table(title=f"{tuned.model}, {tuned.machine}", title_style="", title_justify="left")
    for name, justify in (("layers", "left"), ("weight", "left"), ("kept", "right"), ("dense", "right"), ("sparse", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("verdict")
    for shape in tuned.shapes:
        names = shape.layers[0] + (f" and {len(shape.layers) - 1} more" if len(shape.layers) > 1 else "")
        t = shape.timing
        verdict = "sparse" if t.pays else "dense: " + shape.reason.rpartition("; ")[2]
        kept = f"{t.keep}/{shape.channels}"
        weight = "×".join(map(str, shape.weight))
        table.add_row(names, weight, kept, f"{t.dense * 1e3:.2f} ms", f"{t.sparse * 1e3:.2f} ms", verdict)
    return table
