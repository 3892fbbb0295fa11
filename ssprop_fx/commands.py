"""The commands of ``ssprop-fx``; each reads its arguments, calls the library and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import ssprop_fx

from . import demo as demonstration
from .errors import SSPropError
from .models import FORMS, NameProblem, load_model, make_input
from .policy import Policy

STARTER = """\
# A policy of ssprop-fx: which gradients are dropped, where, and when.
# Check it with `ssprop-fx policy check FILE`; `ssprop-fx policy schema` prints a JSON Schema for editors.
version: 1

# For every layer that no rule changes.
drop_rate: 0.8            # share of output channels whose gradient is dropped; 0 <= drop_rate < 1, 0 is dense
criterion: l1             # how channels are ranked: l1 | l2 | taylor | random
round_to: auto            # kept channels are a multiple of this: auto suits the hardware, 1 is exact
gradients: all            # all | weight (leaves the gradient of the input dense)

# When. A step is one call of policy.step(), or one optimizer step with `clock: optimizer`.
schedule:
  kind: bar               # bar | constant | linear | cosine
  period: 2               # bar: dense in the first half of a period, sparse in the second
  warmup: 0               # dense steps first
  clock: optimizer        # optimizer | manual (you call policy.step() after every optimizer step)

# Where. The last rule that matches a layer decides; it changes only the keys that it names.
# Layer names are those of model.named_modules(); a rule that matches no layer is an error.
rules: []
#  - layers: "conv1"                    # a glob, or "re:..." for a regular expression, or a list of them
#    drop_rate: 0                       # the stem stays dense
#  - layers: ["layer4.*", "head.*"]
#    drop_rate: 0.9
#  - kind: depthwise                    # conv1d ... conv_transpose3d, grouped, depthwise, pointwise, linear
#    drop_rate: 0.5
#    optional: true                     # may match nothing
"""

app = typer.Typer(
    help="Train convolutional networks with a sparse backward pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
policy_app = typer.Typer(help="Check, describe and start policy files.", no_args_is_help=True)
app.add_typer(policy_app, name="policy")

PolicyOption = Annotated[
    Path | None, typer.Option("--policy", "-p", metavar="FILE", help="Policy file; the default policy without it.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"ssprop-fx {ssprop_fx.__version__}, PyTorch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Examples:\n\n  ssprop-fx demo\n\n  ssprop-fx demo --compile --seed 1\n\n"
    "  ssprop-fx demo --policy policy.yaml --json > result.json"
)
def demo(
    policy: PolicyOption = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Through torch.compile: Inductor against the backend ssprop.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the split and the order of the images.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = demonstration.EPOCHS,
    as_json: JsonOption = False,
) -> None:
    """Train a small ResNet on images of digits, dense and under a policy, and compare."""
    chosen = _policy(policy)
    console = Console(stderr=True)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("compiling" if compiled else "", total=None)

        def progress(done: int, total: int, line: str) -> None:
            bar.update(task, completed=done, total=total, description=line)

        result = demonstration.train(chosen, seed, epochs, compiled, progress)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return
    Console().print(_comparison(result))
    print(f"\n{result.report}")


@policy_app.command("check", epilog="Example:\n\n  ssprop-fx policy check policy.yaml && python train.py")
def policy_check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A policy file.")], as_json: JsonOption = False
) -> None:
    """Check a policy file; every problem is printed with its line and what to write instead."""
    policy = Policy.load(file)
    if as_json:
        print(json.dumps({"file": str(file), "digest": policy.digest, "policy": policy.to_dict()}, indent=2))
        return
    schedule = policy.schedule
    print(
        f"{file}: valid. Drop rate {policy.drop_rate:g}, {policy.criterion}, schedule {schedule.kind} "
        f"({schedule.clock} clock), {len(policy.rules)} rules."
    )


@policy_app.command("schema", epilog="Example:\n\n  ssprop-fx policy schema > policy.schema.json")
def policy_schema() -> None:
    """Print the JSON Schema of policy files, with which editors complete and check them."""
    print(json.dumps(Policy.json_schema(), indent=2))


@policy_app.command("init", epilog="Examples:\n\n  ssprop-fx policy init\n\n  ssprop-fx policy init -o policy.yaml")
def policy_init(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write there, not to the screen.")
    ] = None,
) -> None:
    """Print a policy file to start from: the default policy, with comments."""
    if output is None:
        print(STARTER, end="")
        return
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(STARTER)
    except FileExistsError:
        raise SSPropError(f"{output} exists and is left as it is; choose another name, or delete it first") from None
    except OSError as problem:
        raise SSPropError(f"{output} cannot be written: {problem.strerror}") from None
    print(f"wrote {output}")


@app.command(
    epilog="Examples:\n\n  ssprop-fx inspect torchvision:resnet18 --input 2x3x64x64\n\n"
    "  ssprop-fx inspect net.py:build -p policy.yaml -i 4x1x28x28 --step 1\n\n"
    "  ssprop-fx inspect timm:resnet50 -i 2x3x224x224 --html report.html"
)
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=FORMS + ".")],
    shapes: Annotated[
        list[str],
        typer.Option("--input", "-i", metavar="SHAPE", help="Of an input, as 2x3x224x224; repeat it for more inputs."),
    ],
    policy: PolicyOption = None,
    step: Annotated[int, typer.Option(min=0, help="Step of the schedule that the table shows.")] = 0,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the page there, too: dataflow, code and schedule in one file."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what the policy does to each convolution of a model, and measure that none is missed.

    The model gets random weights; a dense and a sparse training step are run and their convolutions counted.
    """
    chosen = _policy(policy)
    try:
        inputs = tuple(make_input(shape) for shape in shapes)
        original = load_model(model)
    except NameProblem as problem:
        raise typer.BadParameter(str(problem)) from None
    for _ in range(step):
        chosen.step()
    transformed = ssprop_fx.transform(original, chosen)
    try:
        transformed(*inputs)  # tells the report the shapes
    except SSPropError:
        raise
    except Exception as problem:  # the model's own code may raise anything
        raise SSPropError(f"{model} does not run on {', '.join(shapes)}: {_first_line(problem)}") from problem
    report = ssprop_fx.inspect(transformed, inputs)
    if html is not None:
        try:
            report.to_html(html)
        except OSError as problem:
            raise SSPropError(f"{html} cannot be written: {problem.strerror}") from None
    print(report.to_json() if as_json else report)


def _policy(file: Path | None) -> Policy:
    return Policy() if file is None else Policy.load(file)


def _first_line(problem: Exception) -> str:
    return (str(problem) or type(problem).__name__).partition("\n")[0]


def _comparison(result: demonstration.Result) -> Table:
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
